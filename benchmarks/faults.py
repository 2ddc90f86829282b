"""
Compares a long run with faults to the same run without: `python -m benchmarks.faults --steps 1000`.

At random moments the process is killed, or its disk is full while a checkpoint is written. A supervisor starts it again with
`resume_from_checkpoint=True`. In both runs, the metric is NaN on one generation batch in fifty, which `nonfinite="skip"` leaves out. Both
must end with the same weights and logs, to the last bit.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.checkpoints import is_whole
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import tiny_causal_lm, tiny_prompts, tiny_tokenizer


CLOCKS = ("seconds", "runtime", "per_second", "step_time", "train_loss", "total_flos")


class SometimesNaN(LMHeadPattern):
    """A pattern whose metric is NaN on one generation batch in fifty, on every process alike."""

    trainer = None

    def __call__(self, model):
        value = super().__call__(model)
        is_broken = (
            self.trainer is not None and self.trainer.state.global_step % 50 == 24 and self.trainer.model.training
        )
        return value * math.nan if is_broken else value


def throw(fault: str, moment: float, save: int) -> None:
    """Kills this process after some seconds of training, or makes its disk full at one of a checkpoint's files."""
    if fault == "kill":
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, moment)
    elif fault == "full disk":
        original, seen = torch.save, 0

        def full(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == save:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        torch.save = full


def train(directory: str, steps: int, fault: str | None, moment: float, save: int) -> int:
    """Trains, or resumes, in a process of its own. Returns the exit status."""
    child = os.fork()
    if child != 0:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 32}
        prompts = tiny_prompts(64, 2)
        metric = SometimesNaN([[1, -1], [-1, 1]], scale="auto")
        config = DatasetPolicyGradientConfig(
            directory,
            max_steps=steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            num_generations=4,
            steps_per_generation=2,
            max_completion_length=6,
            target_batch_size=8,
            target_learning_rate=1e-3,
            target_tape="disk",
            learning_rate=1e-4,
            nonfinite="skip",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=50,
            save_strategy="steps",
            save_steps=5,
            save_total_limit=2,
            disable_tqdm=True,
        )
        trainer = DatasetPolicyGradientTrainer(
            model=tiny_causal_lm(seed=0, **sizes),
            target_model=tiny_causal_lm(seed=1, **sizes),
            metric=metric,
            args=config,
            train_dataset=prompts["train"],
            eval_dataset=prompts["test"],
            processing_class=tiny_tokenizer(),
            target_processing_class=tiny_tokenizer(),
        )
        metric.trainer = trainer
        resume = any(is_whole(path) for path in Path(directory).glob("checkpoint-*"))
        if fault is not None:
            throw(fault, moment, save)
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model()
        rows = [{k: v for k, v in row.items() if not k.endswith(CLOCKS)} for row in trainer.state.log_history]
        (Path(directory) / "history.json").write_text(json.dumps(rows))
        status = 0
    except OSError as error:
        status = 3 if error.errno == errno.ENOSPC else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def outcome(directory: str) -> tuple[str, list]:
    weights = (Path(directory) / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), json.loads((Path(directory) / "history.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="Longest time to a fault.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file to write.")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calm, rough = f"{folder}/calm", f"{folder}/rough"
        if train(calm, options.steps, None, 0, 0) != 0:
            raise SystemExit("The run without faults failed.")
        calm_seconds = time.perf_counter() - start
        counts = {"killed": 0, "full disk": 0}
        while True:
            fault = draw.choice(["kill", "kill", "full disk"])
            status = train(rough, options.steps, fault, draw.uniform(0.2, options.seconds), draw.randrange(1, 20))
            if os.WIFSIGNALED(status):
                counts["killed"] += 1
            elif os.WEXITSTATUS(status) == 3:
                counts["full disk"] += 1
            elif status == 0:
                break
            else:
                raise SystemExit("A run ended otherwise than by the fault thrown into it.")
        (weights, history), (others, other_history) = outcome(calm), outcome(rough)
        leftovers = [path.name for path in Path(rough).glob("checkpoint-*") if not is_whole(path)]
        shutil.rmtree(rough)
    skipped = sum(row.get("metagradient/skipped", 0) > 0 for row in history)
    result = {
        "steps": options.steps,
        "seed": options.seed,
        **counts,
        "logged rows with a skipped batch": skipped,
        "same weights": weights == others,
        "same log": history == other_history,
        "broken checkpoints left": len(leftovers),
        "seconds without faults": round(calm_seconds),
        "seconds with faults": round(time.perf_counter() - start - calm_seconds),
    }
    print(json.dumps(result, indent=2))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    if not (result["same weights"] and result["same log"]):
        raise SystemExit("The runs differ.")


if __name__ == "__main__":
    main()
