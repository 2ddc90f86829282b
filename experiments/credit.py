"""
How many completions a generator needs by each way of giving credit.

    python -m experiments.credit run --patterns 67 --vocabularies 64 2048 --completions 32 512
    python -m experiments.credit report

Generator and target are random GPT-2s of 2 layers and width 64. A generator is trained until a validation passes 0.99 of the
pattern, for `--steps`, or until its texts have collapsed to nothing. A validation is one step of the target on 256 fresh samples
of held-out prompts. Each run adds a line to `experiments/results/credit.jsonl`; one that is there is not repeated. `report` prints
the table.
"""

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from examples.resources import ONE_SPECIAL_TOKEN, tiny_causal_lm, tiny_prompts, tiny_tokenizer
from experiments.common import GENERATOR, append, commands, lines_of
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern


RESULTS = Path(__file__).parent / "results" / "credit.jsonl"
BOUNDS = (0.85, 0.95, 0.99)
VALIDATED = 256  # samples
FIELDS = ["pattern", "vocabulary", "completions", "least_length", "assignment", "discount", "candidates", "seed"]


class ValidateUntilGood(TrainerCallback):
    """Validates every few steps, and ends the run that is good enough."""

    def __init__(self, every: int):
        self.every = every
        self.curve: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            training = self.trainer.target_training
            recipe = training.args
            training.args = replace(recipe, batch_size=VALIDATED)  # one step, as in training
            accuracy = self.trainer.evaluate()["eval_pixel_accuracy"]
            training.args = recipe
            self.curve.append((state.global_step, round(accuracy, 4)))
            control.should_training_stop = accuracy > BOUNDS[-1]


def train(
    pattern: str, vocabulary: int, completions: int, least_length: int, assignment: str, discount: float,
    candidates: int | None, seed: int, steps: int, every: int,
) -> dict:  # fmt: skip
    """One run: its validations, and what it took."""
    words = vocabulary - len(ONE_SPECIAL_TOKEN)
    generator, target = (
        tiny_causal_lm(vocabulary, seed=s, special_tokens=ONE_SPECIAL_TOKEN) for s in (2 * seed, 2 * seed + 1)
    )
    prompts = tiny_prompts(4096, 64, num_words=min(words, 60))
    metric = LMHeadPattern.sixty_seven(scale="auto") if pattern == "67" else LMHeadPattern.qr("TRL-DPG", scale="auto")
    callback = ValidateUntilGood(every)
    with tempfile.TemporaryDirectory() as directory:
        args = DatasetPolicyGradientConfig(
            directory,
            seed=seed,
            credit_assignment=assignment,
            credit_discount=discount,
            credit_candidates=candidates,
            max_steps=steps,
            per_device_train_batch_size=completions,
            per_device_eval_batch_size=VALIDATED,
            num_generations=4,
            generation_kwargs={"min_new_tokens": least_length},
            logging_strategy="no",
            **{**GENERATOR, "lr_scheduler_type": "constant"},
        )
        tokenizers = [tiny_tokenizer(words, ONE_SPECIAL_TOKEN) for _ in range(2)]
        trainer = DatasetPolicyGradientTrainer(
            generator, target, metric, args, prompts["train"], prompts["test"], tokenizers[0], tokenizers[1],
            callbacks=[callback],
        )  # fmt: skip
        callback.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        collapsed = False
        try:
            trainer.train()
        except ValueError as error:
            if "empty or one token long" not in str(error):
                raise
            collapsed = True
        seconds = time.perf_counter() - start
    fields = (pattern, vocabulary, completions, least_length, assignment, discount, candidates, seed)
    run = dict(zip(FIELDS, fields, strict=True))
    what = {"curve": callback.curve, "steps": trainer.state.global_step, "collapsed": collapsed}
    return {**run, **what, "seconds": round(seconds, 1)}


def reached(run: dict, bound: float) -> int | None:
    """Completions until a validation first passed a bound."""
    return next((step * run["completions"] for step, accuracy in run["curve"] if accuracy > bound), None)


def done() -> list[dict]:
    return [{"least_length": 0, **line} for line in lines_of(RESULTS)]


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    grid = itertools.product(
        options.patterns, options.vocabularies, options.completions, options.least_lengths, options.assignments,
        options.discounts, options.candidates, options.seeds,
    )  # fmt: skip
    for values in grid:
        settings = dict(zip(FIELDS, values, strict=True))
        if settings["assignment"] == "sequence":
            settings["discount"] = 1.0
        if settings["assignment"] != "expected":
            settings["candidates"] = None
        if any(all(line[name] == settings[name] for name in FIELDS) for line in done()):
            continue
        line = train(*settings.values(), steps=options.steps, every=options.every)
        append(RESULTS, line)
        print({name: line[name] for name in FIELDS}, line["curve"][-1:], f"{line['seconds']} s", flush=True)


def report(options: argparse.Namespace) -> None:
    names = [
        "pattern",
        "words",
        "completions a step",
        "least length",
        "credit",
        "γ",
        "candidates",
        "seeds",
        *(f"to {bound}" for bound in BOUNDS),
        "best",
    ]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    runs = done()
    keys = sorted(
        {tuple(str(r[name]) for name in FIELDS[:-1]) for r in runs}, key=lambda k: (k[0], int(k[1]), int(k[2]), k[3:])
    )
    for key in keys:
        same = [r for r in runs if tuple(str(r[name]) for name in FIELDS[:-1]) == key]
        cells = [f"{median(same, bound)}" for bound in BOUNDS]
        best = statistics.median(max((accuracy for _, accuracy in r["curve"]), default=0.5) for r in same)
        name = [
            "all" if value == "None" and key[4] == "expected" else "" if value == "None" else value for value in key
        ]
        lines.append(f"| {' | '.join(name)} | {len(same)} | {' | '.join(cells)} | {best:.3f} |")
    print("\n".join(lines))


def median(runs: list[dict], bound: float) -> str:
    """Median over seeds of the completions to a bound; a run that never passed it counts as the longest."""
    found = sorted(reached(r, bound) or float("inf") for r in runs)
    middle = statistics.median_low(found)
    if middle < float("inf"):
        return f"{middle:,}"
    longest = max(r["steps"] * r["completions"] for r in runs)
    collapsed = sum(r.get("collapsed", False) for r in runs)
    return f"not in {longest:,}" + (f", {collapsed} collapsed" if collapsed else "")


def main() -> None:
    parser, runner = commands(__doc__.splitlines()[1], run, report)
    runner.add_argument("--patterns", nargs="+", default=["67", "qr"])
    runner.add_argument("--vocabularies", nargs="+", type=int, default=[64, 256, 2048])
    runner.add_argument("--completions", nargs="+", type=int, default=[32, 512], help="a step")
    runner.add_argument("--least_lengths", nargs="+", type=int, default=[0], help="of completions, in tokens")
    runner.add_argument("--assignments", nargs="+", default=["sequence", "token", "expected"])
    runner.add_argument("--discounts", nargs="+", type=float, default=[0.5])
    every = lambda text: None if text == "all" else int(text)  # noqa: E731
    runner.add_argument("--candidates", nargs="+", type=every, default=[None], help="numbers, or 'all'")
    runner.add_argument("--steps", type=int, default=120)
    runner.add_argument("--every", type=int, default=10, help="steps between validations")
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
