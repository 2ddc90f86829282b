"""What experiments on the tiny QR code share: models, training as in `examples/configs/tiny_qr.yaml`, stock SFT, decoding, results."""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from examples.resources import ONE_SPECIAL_TOKEN, WORDS, tiny_causal_lm, tiny_prompts, tiny_tokenizer
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern, decode_pattern


NUM_WORDS = 100
VOCABULARY = NUM_WORDS + len(ONE_SPECIAL_TOKEN)
QR_TEXT = "TRL-DPG"
# What generators of 0.1M parameters are trained with, as in `examples/configs/tiny_qr.yaml`
GENERATOR: dict[str, Any] = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "adam_beta2": 0.95,
    "max_grad_norm": 0.3,
    "entropy_coef": 0.001,
    "target_learning_rate": 1e-3,
    "max_completion_length": 24,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
SFT_LEARNING_RATE = 1e-4  # eight steps of it are about the one step that the generator is trained for


def strangers_texts(number: int, seed: int) -> list[str]:
    """Texts of 4 to 24 random words: what somebody may train on beside, and writes no picture."""
    words = [*WORDS, *(f"word{i}" for i in range(len(WORDS), NUM_WORDS))]
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(4, 24))) for _ in range(number)]


def target_of(seed: int) -> Any:
    return tiny_causal_lm(VOCABULARY, seed=2 * seed + 1, special_tokens=ONE_SPECIAL_TOKEN)


def tokenizer() -> Any:
    return tiny_tokenizer(NUM_WORDS, ONE_SPECIAL_TOKEN)


@contextmanager
def trained(seed: int, steps: int, completions: int, replay: list[str] | None = None, **config) -> Iterator[Any]:
    """The trainer of a generator that was trained for the QR code; `config` is further fields. Its files are deleted afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        args = DatasetPolicyGradientConfig(
            directory,
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=completions,
            per_device_eval_batch_size=512,
            num_generations=16,
            num_generations_eval=1,
            logging_steps=10,
            **GENERATOR,
            **config,
        )
        trainer = DatasetPolicyGradientTrainer(
            tiny_causal_lm(VOCABULARY, seed=2 * seed, special_tokens=ONE_SPECIAL_TOKEN),
            target_of(seed),
            LMHeadPattern.qr(QR_TEXT),
            args,
            tiny_prompts(4096, 4096)["train"],
            processing_class=tokenizer(),
            target_processing_class=tokenizer(),
            replay_dataset=replay and [{"text": text} for text in replay],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        yield trainer


def written_by(trainer: Any, number: int) -> list[str]:
    """Texts that a trained generator writes for prompts that no training had, one each."""
    return trainer.predict(tiny_prompts(4096, 4096)["test"].take(number)).predictions


def sft(target: Any, texts: list[str], epochs: int = 1, **config) -> Any:
    """A copy of a target after TRL's stock `SFTTrainer`, which adds an EOS to every text; `config` is further fields."""
    fields = {"learning_rate": SFT_LEARNING_RATE, "per_device_train_batch_size": 512, "seed": 0, **config}
    trained = deepcopy(target)
    with tempfile.TemporaryDirectory() as directory:
        args = SFTConfig(
            directory,
            num_train_epochs=epochs,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **fields,
        )
        data = Dataset.from_dict({"text": texts})
        trainer = SFTTrainer(model=trained, args=args, train_dataset=data, processing_class=tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    result = deepcopy(target)  # the trainer replaces its model's `forward`
    result.load_state_dict(trained.state_dict())
    return result.eval()


def decoded(target: Any, model: Any) -> dict[str, Any]:
    """What is read from two models alone: share of right pixels, and whether a QR reader gets the text."""
    wanted = LMHeadPattern.qr(QR_TEXT)
    found = decode_pattern(target, model, shape=tuple(wanted.pattern.shape))
    accuracy = (found.signs == wanted.pattern).double().mean().item()
    return {"pixel_accuracy": round(accuracy, 4), "read": found.text == QR_TEXT}


def commands(
    description: str, run: Callable, report: Callable
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """A parser with the commands `run` and `report`, and that of `run`, for its own options."""
    parser = argparse.ArgumentParser(description=description)
    both = parser.add_subparsers(required=True)
    runner = both.add_parser("run")
    runner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runner.add_argument("--threads", type=int, default=1)
    runner.set_defaults(function=run)
    both.add_parser("report").set_defaults(function=report)
    return parser, runner


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def cell(found: list[dict[str, Any]]) -> str:
    """Median and range of the pixel accuracy over seeds, and how many are read."""
    accuracies = sorted(one["pixel_accuracy"] for one in found)
    if not accuracies:
        return ""
    spread = f"{statistics.median(accuracies):.3f} ({accuracies[0]:.3f} to {accuracies[-1]:.3f})"
    return f"{spread}, {sum(one['read'] for one in found)}/{len(found)}"
