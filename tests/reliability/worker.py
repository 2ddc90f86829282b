"""Run by `torchrun` from the tests beside it: a training run in which something happens to the last process, or drawn cases."""

import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from hypothesis import Phase, given, settings

from tests.distributed.worker import COMMON, examples
from tests.reliability.cases import COMPLETIONS, RECIPES, TOKENIZER, metric, model
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer, MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_causal_lm, tiny_prompts


def happen(what):
    if what == "raise":
        raise ArithmeticError("planted failure")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while what in ("hang", "stubborn", "launcher"):
        time.sleep(1)


def train(what, where, directory):
    """Two steps of training, K = 4 with the tape on disk; on the last process, something happens in the second one."""
    args = DatasetPolicyGradientConfig(
        os.path.join(directory, "run"),
        **{**COMMON, "use_cpu": True},
        per_device_train_batch_size=4,
        ddp_timeout=10,
        target_batch_size=2,
        target_learning_rate=1e-3,
        target_tape="disk",
        target_tape_dir=directory,
    )
    state = PartialState()
    Path(directory, f"pid-{state.process_index}").write_text(str(os.getpid()))
    with state.main_process_first():
        generator, target = save_tiny_models(os.path.join(os.path.dirname(directory), "models"))
    last = state.process_index == state.num_processes - 1
    calls = []

    class Metric(LMHeadPattern):
        def readouts(self, model):  # between the sweeps, in a block that fails together
            calls.append(1)
            if last and where == "metric" and len(calls) == 2:
                happen(what)
            return super().readouts(model)

    def reward(completion_ids, **kwargs):  # of the user's own, where nobody agrees on failures
        if last and where == "reward" and len(calls) == 2:
            happen(what)
        return [0.0] * len(completion_ids)

    pattern = LMHeadPattern.sixty_seven(scale="auto")
    metric = Metric(pattern.pattern, scale="auto")
    prompts = tiny_prompts(12, 3)
    trainer = DatasetPolicyGradientTrainer(
        generator, target, metric, args, prompts["train"], prompts["test"], reward_funcs=reward
    )
    if where == "metric" and what == "launcher" and last:
        threading.Thread(target=_when_reached, args=(calls, directory), daemon=True).start()
    trainer.train()


def _when_reached(calls, directory):
    while len(calls) < 2:
        time.sleep(0.1)
    Path(directory, "reached").write_text("")


def out_of_memory(state):
    """Memory runs out on the last process only, in either sweep: what both processes return, and what they were asked to do."""
    results = {}
    for name, fields in {
        "exact": {"adam_epsilon_root": 1e-6},
        "central": {"adam_epsilon_root": 1e-6, "curvature": "central_difference"},
        "one-step": {"adam_epsilon_root": "auto", "batch_size": 12},
    }.items():
        for sweep in (None, 1, 2):
            target, calls = tiny_causal_lm(hidden_size=16, seed=1).double(), []
            pattern = LMHeadPattern.sixty_seven()

            def counted(model, calls=calls, pattern=pattern):
                calls.append(1)
                return pattern(model)

            counted.setup = pattern.setup
            sizes = []

            def fail(module, args, calls=calls, sweep=sweep, sizes=sizes):
                sizes.append(len(args[0]))
                if state.process_index == state.num_processes - 1 and len(calls) == sweep and len(args[0]) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

            compute_metagradients(target, examples(2), pattern)  # checks the model
            target.transformer.h[0].register_forward_pre_hook(fail)
            args = TargetTrainingArguments(**{"batch_size": 8, "learning_rate": 1e-3, **fields})
            out = compute_metagradients(target, examples(12), counted, args, accelerator=state)
            results[f"{name}-{sweep}"] = {
                "metagradients": out.metagradients.tolist(),
                "size": out.micro_batch_size,
                "last": sizes[-1],
            }

    def starved(model):
        if state.process_index == state.num_processes - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return pattern(model)

    try:
        compute_metagradients(target, examples(12), starved, args, accelerator=state)
    except (MemoryError, RuntimeError) as error:
        results["metric"] = f"{type(error).__name__}: {error}"
    return results


def drawn(state):
    """Rewards of drawn completions, of which each process has a contiguous part: perhaps none."""
    cases = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(rows=COMPLETIONS, recipe=RECIPES)
    def collect(rows, recipe):
        cases.append((rows, recipe))

    collect()
    target, results = model(), []
    for rows, recipe in cases:
        reward = MetagradientReward(target, metric, TargetTrainingArguments(**recipe), TOKENIZER)
        bounds = [len(rows) * i // state.num_processes for i in (state.process_index, state.process_index + 1)]
        mine, columns = rows[slice(*bounds)], {}
        try:
            rewards = reward(
                prompts=[""] * len(mine),
                completions=[text for text, _ in mine],
                completion_ids=[[7, TOKENIZER.eos_token_id] if ended else [7, 8] for _, ended in mine],
                log_extra=columns.__setitem__,
            )
            results.append({"raw": columns["metagradient_raw"], "rewards": rewards})
        except (ValueError, RuntimeError) as error:
            results.append({"error": str(error)})
    return results


if __name__ == "__main__":
    what, where, directory = sys.argv[1:]
    torch.set_num_threads(1)
    if what in ("memory", "drawn"):
        state = PartialState(cpu=True, timeout=timedelta(seconds=60))
        results = out_of_memory(state) if what == "memory" else drawn(state)
        Path(directory, f"{state.process_index}.json").write_text(json.dumps(results))
        state.destroy_process_group()
    else:
        train(what, where, directory)
