"""Run by `torchrun` from `test_two_processes.py`: one scenario, results written by the main process as JSON."""

import hashlib
import json
import os
import sys
import zlib

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer, MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.method.tape import Tape
from trl_dpg.metagradients.runtime.processes import Processes
from trl_dpg.metagradients.runtime.sharding import is_in_shards
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_causal_lm, tiny_prompts, tiny_tokenizer


COMMON = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "log_completions": True,
}


def examples(n):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(60, (3 + i % 5,), generator=generator).tolist()} for i in range(n)]


def engine(state, directory):
    """Batches of 5, 5 and 1 example, the last with fewer than there are processes; micro-batches; a process with none."""
    model = tiny_causal_lm(hidden_size=16, seed=1).double()
    metric = LMHeadPattern.sixty_seven()
    results = {}
    sums = [0.1 / state.num_processes]
    with Processes(state).summing_over_processes(torch.zeros(4), sums):
        pass
    assert abs(sums[0] - 0.1) < 1e-15  # in float64, whatever the gradient's type
    for name, fields in {
        "adamw": {"adam_epsilon_root": 1e-6, "learning_rate": 1e-3},
        "auto": {"adam_epsilon_root": "auto", "learning_rate": 1e-3, "max_grad_norm": 0.1, "micro_batch_size": 1},
        "sgd": {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2, "loss_normalization": "example"},
        "nesterov": {"optim": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "max_grad_norm": 0.1},
        "muon": {"optim": "muon", "adam_epsilon_root": 1e-6, "learning_rate": 1e-3, "max_grad_norm": 0.1},
    }.items():
        args = TargetTrainingArguments(batch_size=5, **fields)
        rows = examples(11)
        for i, row in enumerate(rows[:-2]):  # two without
            row["candidates"] = [[(token + i) % 60, -1] for token in row["input_ids"]]
        out = compute_metagradients(model, rows, metric, args, accelerator=state)
        results[name] = [*out.metagradients.tolist(), out.metric_after, *out.losses]
        results[f"{name}_tokens"] = torch.cat(out.token_metagradients).tolist()
        results[f"{name}_candidates"] = torch.cat([c.flatten() for c in out.candidate_metagradients]).tolist()
    return results


def deterministic_generation(trainer):
    """Completions that depend on the prompt and the row in the global batch alone, not on the process's random state."""

    def generate(prompt_ids, images, multimodal_fields, num_generations):
        first_row = trainer.accelerator.process_index * len(prompt_ids)
        completions = []
        for row, ids in enumerate(prompt_ids, start=first_row):
            seed = zlib.crc32(bytes(ids)) + row % trainer.num_generations
            generator = torch.Generator().manual_seed(seed)
            completion = torch.randint(60, (2 + seed % 7,), generator=generator).tolist()
            completions.append([*completion, trainer.processing_class.eos_token_id] if seed % 2 else completion)
        return completions, None

    trainer._generate_single_turn = generate


def record(trainer):
    """Rewards, raw metagradients and metrics of every step."""
    rows = []
    log = trainer.log

    def recording_log(logs, start_time=None):
        rewards = {name: list(values) for name, values in trainer._logs["rewards"].items()}
        raw = list(trainer._logs["extra"]["metagradient_raw"])
        log(logs, start_time)
        metrics = {
            k: v for k, v in logs.items() if k.startswith("metagradient/") or k in ("eval_metric", "eval_empty")
        }
        rows.append({"rewards": rewards, "raw": raw, **{k: v for k, v in metrics.items() if "seconds" not in k}})

    trainer.log = recording_log
    return rows


def stock_trainer(state, directory):
    """6 rows a process on two: a prompt's group of 4 spans both."""
    world = state.num_processes
    args = GRPOConfig(directory, **COMMON, per_device_train_batch_size=12 // world, scale_rewards="batch")
    reward = MetagradientReward(
        tiny_causal_lm(seed=1),
        LMHeadPattern.sixty_seven(scale="auto"),
        TargetTrainingArguments(batch_size=5, learning_rate=1e-3, adam_epsilon_root="auto"),
        processing_class=tiny_tokenizer(),
    )
    policy = tiny_causal_lm(seed=0)
    dataset = tiny_prompts(12, 3)["train"]
    trainer = GRPOTrainer(policy, reward, args, dataset, processing_class=tiny_tokenizer())
    deterministic_generation(trainer)
    rows = record(trainer)
    trainer.train()
    return {"rows": rows}


def our_trainer(state, directory):
    """As above, with validation on an odd number of prompts."""
    world = state.num_processes
    args = DatasetPolicyGradientConfig(
        directory,
        **COMMON,
        per_device_train_batch_size=12 // world,
        per_device_eval_batch_size=8 // world,
        eval_strategy="steps",
        eval_steps=1,
        target_batch_size=5,
        target_learning_rate=1e-3,
    )
    with state.main_process_first():
        policy, target = save_tiny_models(os.path.join(directory, "models"))
    prompts = tiny_prompts(12, 3)
    metric = LMHeadPattern.sixty_seven(scale="auto")
    trainer = DatasetPolicyGradientTrainer(policy, target, metric, args, prompts["train"], prompts["test"])
    deterministic_generation(trainer)
    rows = record(trainer)
    trainer.train()
    return {"rows": rows}


def judge(state, directory):
    """A judge of texts that answers the main process alone, and then fails. Returns what each process reported."""

    def text_evaluation(texts):
        if not state.is_main_process or not answers:
            raise ArithmeticError("planted failure")
        return answers.pop()

    answers = [{"verdict": 0.25}]
    args = DatasetPolicyGradientConfig(
        directory, **COMMON, per_device_train_batch_size=4, per_device_eval_batch_size=4
    )
    prompts, tokenizer = tiny_prompts(12, 3), tiny_tokenizer()
    trainer = DatasetPolicyGradientTrainer(
        tiny_causal_lm(), tiny_causal_lm(seed=1), LMHeadPattern.sixty_seven(), args, prompts["train"], prompts["test"],
        tokenizer, tokenizer, text_evaluation=text_evaluation,
    )  # fmt: skip
    reported = [trainer.evaluate()["eval_verdict"]]
    try:
        trainer.evaluate()
    except (ArithmeticError, RuntimeError) as error:
        reported.append(str(error))
    return gather_object([reported])


def resumed(state, directory):
    """A run with the target in shards, and one from its checkpoint inside a generation batch."""
    fields = {
        **COMMON,
        "max_steps": 4,
        "log_completions": False,
        "per_device_train_batch_size": 12 // state.num_processes,
        "per_device_eval_batch_size": 8 // state.num_processes,
        "steps_per_generation": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "learning_rate": 1e-2,
        "target_batch_size": 5,
        "target_learning_rate": 1e-3,
        "target_fsdp": True,
    }
    with state.main_process_first():
        policy, target = save_tiny_models(os.path.join(directory, "models"))
    prompts = tiny_prompts(24, 3)
    results = {}
    for name, checkpoint in [("whole", None), ("resumed", os.path.join(directory, "whole", "checkpoint-1"))]:
        saving = {} if checkpoint else {"save_strategy": "steps", "save_steps": 1}
        args = DatasetPolicyGradientConfig(os.path.join(directory, name), **{**fields, **saving})
        metric = LMHeadPattern.sixty_seven(scale="auto")
        trainer = DatasetPolicyGradientTrainer(policy, target, metric, args, prompts["train"], prompts["test"])
        trainer.train(checkpoint)
        weights = b"".join(param.detach().numpy().tobytes() for param in trainer.model.parameters())
        clocks = ("seconds", "runtime", "per_second", "step_time", "train_loss", "total_flos")
        history = [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in trainer.state.log_history]
        results[name] = {
            "weights": hashlib.sha256(weights).hexdigest(),
            "history": history,
            "reward": trainer.target_training.state(),
        }
        results["in_shards"] = is_in_shards(trainer.target_training.target_model)
    return results


def failure(state, directory):
    """A metric that fails on the last process only."""

    def metric(model):
        if state.process_index == state.num_processes - 1:
            raise ArithmeticError("planted failure")
        return -model.lm_head.weight.norm()

    args = TargetTrainingArguments(batch_size=2)
    return compute_metagradients(tiny_causal_lm(hidden_size=16), examples(4), metric, args, accelerator=state).losses


def failing_tape(state, directory):
    """A tape that fails on the last process only: when something is put on it, and when something is taken off it."""
    reasons = []
    for method in ("push", "restore"):
        original = getattr(Tape, method)

        def failing(self, *args, method=method):
            if state.process_index == state.num_processes - 1:
                raise OSError(f"planted failure of {method}")
            return original(self, *args)  # noqa: B023

        setattr(Tape, method, failing)
        args = TargetTrainingArguments(batch_size=2, max_grad_norm=1e-3)
        model, metric = tiny_causal_lm(hidden_size=16), LMHeadPattern.sixty_seven()
        try:
            compute_metagradients(model, examples(4), metric, args, accelerator=state)
        except (OSError, RuntimeError) as error:
            reasons.append(str(error))
        setattr(Tape, method, original)
    return reasons


if __name__ == "__main__":
    scenario, directory, output = sys.argv[1:]
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    results = globals()[scenario](state, directory)
    if state.is_main_process:
        with open(output, "w") as file:
            json.dump(results, file)
    state.destroy_process_group()
