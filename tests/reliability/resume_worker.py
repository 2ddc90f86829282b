"""
Runs that kill themselves at a given moment, and what comes of them when they are resumed. Each run is a forked process of its own, so
that SIGKILL is SIGKILL. Prints what each scenario ended with as JSON.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerState

import trl_dpg.fine_tuning
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metagradients.runtime.storage import DiskStorage
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import tiny_causal_lm, tiny_prompts, tiny_tokenizer


# Two steps to a generation batch, each batch trained on twice; K = 2; a checkpoint at every step
CONFIG = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_completion_length": 6,
    "target_batch_size": 8,
    "target_learning_rate": 1e-3,
    "target_tape": "disk",
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "disable_tqdm": True,
}
CLOCKS = ("seconds", "runtime", "per_second", "step_time", "train_loss", "total_flos")


def make_trainer(directory: str, **config) -> DatasetPolicyGradientTrainer:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 32}
    prompts = tiny_prompts(16, 3)
    return DatasetPolicyGradientTrainer(
        model=tiny_causal_lm(seed=0, **sizes),
        target_model=tiny_causal_lm(seed=1, **sizes),
        metric=LMHeadPattern([[1, -1], [-1, 1]], scale="auto"),
        args=DatasetPolicyGradientConfig(directory, **{**CONFIG, **config}),
        train_dataset=prompts["train"],
        eval_dataset=prompts["test"],
        processing_class=tiny_tokenizer(),
        target_processing_class=tiny_tokenizer(),
        replay_dataset=tiny_prompts(20, 1, seed=1)["train"].rename_column("prompt", "text")
        if "replay_ratio" in config
        else None,
    )


def kill_at(place: str) -> None:
    """Has this process killed at `NAME:COUNT`, the COUNT-th time that it comes by."""
    name, count = place.split(":")
    owner, attribute = {
        "generation": (DatasetPolicyGradientTrainer, "_generate_single_turn"),
        "inner_loop": (DiskStorage, "put"),
        "metric": (LMHeadPattern, "__call__"),
        "validation": (trl_dpg.fine_tuning, "validate"),
        "optimizer_saved": (Trainer, "_save_scaler"),
        "rng_saved": (DatasetPolicyGradientTrainer, "_save_generation_batch"),
        "rotation": (Path, "unlink"),
        "half_a_state": (TrainerState, "save_to_json"),
    }[name]
    original = getattr(owner, attribute)
    seen = 0

    def counted(*args, **kwargs):
        nonlocal seen
        if name == "rotation" and not (args[0].name == "model.safetensors" and "checkpoint-" in args[0].parent.name):
            return original(*args, **kwargs)
        seen += 1
        if seen == int(count):
            if name == "rotation":  # half way through
                original(*args, **kwargs)
            if name == "half_a_state":
                original(*args, **kwargs)
                path = Path(args[1])
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, counted)


def run(directory: str, resume: bool, place: str | None, config: dict) -> int:
    """Trains in a process of its own; returns its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            if place is not None:
                kill_at(place)
            trainer = make_trainer(directory, **config)
            trainer.train(resume_from_checkpoint=resume or None)
            trainer.save_model()
            (Path(directory) / "history.json").write_text(json.dumps(trainer.state.log_history))
            (Path(directory) / "reward.json").write_text(json.dumps(trainer.target_training.state()))
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def outcome(directory: str) -> dict:
    folder = Path(directory)
    history = json.loads((folder / "history.json").read_text())
    rows = [{k: v for k, v in row.items() if not k.endswith(CLOCKS)} for row in history]
    return {
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "history": rows,
        "reward": json.loads((folder / "reward.json").read_text()),
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        "generated": [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("generated/*"))],
        "log": (folder / "report" / "log.jsonl").read_text().count("\n"),
    }


def main(directory: str, scenarios: dict[str, dict]) -> None:
    results = {}
    for name, scenario in scenarios.items():
        here = str(Path(directory) / name)
        kills = []
        for number, place in enumerate([*scenario["kills"], None]):
            status = run(here, number > 0, place, scenario.get("config", {}))
            kills.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
        results[name] = {"kills": kills, **outcome(here)}
    print("RESULTS " + json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
