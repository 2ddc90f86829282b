"""Shared by experiments on tiny models: models, training as in `examples/configs/tiny_qr.yaml`, stock SFT, decoding, results."""

import argparse
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import torch
from datasets import Dataset, DatasetDict
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern, decode_pattern
from trl_dpg.scripts.verify import fine_tune
from trl_dpg.testing import ONE_SPECIAL_TOKEN, WORDS, tiny_causal_lm, tiny_prompts, tiny_tokenizer


NUM_WORDS = 100
QR_TEXT = "TRL-DPG"
# Settings of generators of 0.1M parameters, as in `examples/configs/tiny_qr.yaml`
GENERATOR: dict[str, Any] = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "adam_beta2": 0.95,
    "max_grad_norm": 0.3,
    "num_iterations": 2,
    "entropy_coef": 0.001,
    "target_learning_rate": 1e-3,
    "per_device_eval_batch_size": 512,
    "num_generations": 16,
    "max_completion_length": 24,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
SFT_LEARNING_RATE = 1e-4  # eight steps of it are about the one step that the generator is trained for


def random_model(seed: int, num_words: int = NUM_WORDS) -> Any:
    return tiny_causal_lm(num_words + len(ONE_SPECIAL_TOKEN), seed=seed, special_tokens=ONE_SPECIAL_TOKEN)


def target_of(seed: int, num_words: int = NUM_WORDS) -> Any:
    return random_model(2 * seed + 1, num_words)


def tokenizer(num_words: int = NUM_WORDS) -> Any:
    return tiny_tokenizer(num_words, ONE_SPECIAL_TOKEN)


def strangers_texts(number: int, seed: int) -> list[str]:
    """Texts of 4 to 24 random words. They stand for other data to train on, and write no picture."""
    words = [*WORDS, *(f"word{i}" for i in range(len(WORDS), NUM_WORDS))]
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(4, 24))) for _ in range(number)]


@contextmanager
def trainer_of(
    target: Any,
    metric: Any,
    prompts: DatasetDict,
    num_words: int = NUM_WORDS,
    replay: Any = None,
    generator: Any = None,
    words: Any = None,
    peft_config: Any = None,
    **config,
) -> Iterator[Any]:
    """
    The trainer of a random generator, or of `generator` with its tokenizer `words`. `config` holds settings that differ from `GENERATOR`.
    Its files are deleted afterwards.
    """
    with tempfile.TemporaryDirectory() as directory:
        args = DatasetPolicyGradientConfig(directory, **{**GENERATOR, **config})
        trainer = DatasetPolicyGradientTrainer(
            generator or random_model(2 * args.seed, num_words),
            target,
            metric,
            args,
            prompts["train"],
            prompts["test"],
            processing_class=words or tokenizer(num_words),
            target_processing_class=words or tokenizer(num_words),
            replay_dataset=replay,
            peft_config=peft_config,
        )
        trainer.remove_callback(PrinterCallback)
        yield trainer


def texts_of_generator(seed: int, samples: int, replay: list[str] | None = None, **config) -> tuple[list[str], float]:
    """Texts of a generator that was trained for the QR code, for prompts that no training had, and seconds of training."""
    prompts, rows = tiny_prompts(4096, 4096), replay and [{"text": text} for text in replay]
    config = {"seed": seed, "num_generations_eval": 1, **config}
    with trainer_of(target_of(seed), LMHeadPattern.qr(QR_TEXT), prompts, replay=rows, **config) as trainer:
        seconds = trainer.train().metrics["train_runtime"]
        return trainer.predict(prompts["test"].take(samples)).predictions, round(seconds, 1)


class Validate(TrainerCallback):
    """Validates every few steps, by one step of the target on this many samples. Ends a run if enough pixels are right."""

    def __init__(self, trainer: Any, every: int, samples: int, enough: float = 1.0):
        self.trainer, self.every, self.samples, self.enough = trainer, every, samples, enough
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            training = self.trainer.target_training
            recipe = training.args
            training.args = replace(recipe, batch_size=self.samples)  # one step, as in training
            self.curve.append({"step": state.global_step, **self.trainer.evaluate()})
            training.args = recipe
            control.should_training_stop = self.curve[-1]["eval_pixel_accuracy"] > self.enough


def sft(target: Any, tokenizer: Any, rows: Dataset, **config) -> Any:
    """
    A copy of a target after TRL's stock `SFTTrainer`, which adds an EOS to every `text` and none to `input_ids`; in eval mode, on the
    CPU. `config` is what differs from one pass of 512 a step at a constant rate.
    """
    with tempfile.TemporaryDirectory() as directory:
        fields = {
            "learning_rate": SFT_LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 512,
            "num_train_epochs": 1,
            "seed": 0,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.accelerator.is_available(),
        }
        return fine_tune(target, tokenizer, rows, SFTConfig(directory, **{**fields, **config}))[0].eval()


def decoded(target: Any, model: Any) -> dict[str, Any]:
    """Reads the picture from two models alone: share of right pixels, and whether a QR reader gets the text."""
    wanted = LMHeadPattern.qr(QR_TEXT)
    found = decode_pattern(target, model, shape=tuple(wanted.pattern.shape))
    return {"pixel_accuracy": round(pixel_accuracy(found.signs, wanted), 4), "read": found.text == QR_TEXT}


def pixel_accuracy(signs: torch.Tensor, wanted: LMHeadPattern) -> float:
    return (signs == wanted.pattern).double().mean().item()


@torch.no_grad()
def read(metric: Any, target: Any) -> dict[str, float]:
    """The metric and its read-outs of a target, without fine-tuning."""
    metric.setup(target.eval())
    return {"metric": metric(target).item(), **metric.readouts(target)}


def commands(
    description: str, run: Callable, report: Callable
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """A parser with the commands `run` and `report`. Also returns the parser of `run`, to which options can be added."""
    parser = argparse.ArgumentParser(description=description)
    both = parser.add_subparsers(required=True)
    runner = both.add_parser("run")
    runner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runner.add_argument("--threads", type=int, default=1)
    runner.set_defaults(function=run)
    both.add_parser("report").set_defaults(function=report)
    return parser, runner


def commands_for_generators(module: Any, field: str, values: list) -> None:
    """
    The command line of an experiment that trains a QR code's generator in several ways and reads what its texts do.

    `module` has `__doc__`, `RESULTS`, `one` and `report`; `field` is the setting in which generators differ, and `values` are those
    that are run where nothing else is said.
    """

    def run(options: argparse.Namespace) -> None:
        same = {"steps": options.steps, "completions": options.completions}
        grid = [{"seed": s, field: value, **same} for s in options.seeds for value in getattr(options, f"{field}s")]
        run_missing(module.RESULTS, grid, partial(module.one, samples=options.samples), options.threads)

    choices = values if isinstance(values[0], str) else None  # numbers may be others
    parser, runner = commands(module.__doc__.splitlines()[1], run, lambda options: module.report())
    runner.add_argument(f"--{field}s", nargs="+", type=type(values[0]), default=values, choices=choices)
    runner.add_argument("--steps", type=int, default=200)
    runner.add_argument("--completions", type=int, default=512, help="a step")
    runner.add_argument("--samples", type=int, default=4096, help="texts of a trained generator")
    options = parser.parse_args()
    options.function(options)


def run_missing(path: Path, grid: Iterable[dict], one: Callable[..., dict], threads: int, **defaults) -> None:
    """
    Runs each of the settings that has no line in a file of results yet. Adds its line: the settings and the result of `one`.

    `defaults` are settings that early lines lack.
    """
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    for settings in grid:
        if not any(settings.items() <= {**defaults, **line}.items() for line in lines_of(path)):
            line = {**settings, **one(**settings)}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(found: list[dict[str, Any]]) -> str:
    """Median and range of the pixel accuracy over seeds, and number of seeds whose code is read."""
    accuracies = sorted(one["pixel_accuracy"] for one in found)
    if not accuracies:
        return ""
    spread = f"{statistics.median(accuracies):.3f} ({accuracies[0]:.3f} to {accuracies[-1]:.3f})"
    return f"{spread}, {sum(one['read'] for one in found)}/{len(found)}"


LINE_STYLES = {"sequence": "--", "token": ":"}  # by credit


def plot_training(panels: dict[str, list[tuple[str, dict]]], readouts: dict[str, str], path: Path) -> None:
    """
    Draws what the metric's read-out was on each generation batch, before the generator learned from it: a panel for each goal.

    `panels` maps a title to labels of runs and their lines in a file of results. `readouts` names the read-out of each title.
    A title without runs has no panel.
    """
    panels = {title: runs for title, runs in panels.items() if runs}
    size = 4 * len(panels), 3.5 + 0.17 * max(map(len, panels.values()))  # inches, with room for legends below
    figure, every_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (title, runs) in zip(every_axes[0], panels.items(), strict=True):
        for label, line in runs:
            written = [(number + 1) * line["completions"] for number in range(len(line["curve"]))]
            values = [row[readouts[title]] for row in line["curve"]]
            axes.plot(written, values, label=label, linestyle=LINE_STYLES.get(line["writer"], "-"))
        axes.set(title=title, xlabel="completions", ylabel=readouts[title].replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, dpi=150)
    plt.close(figure)
