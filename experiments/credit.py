"""
Measures how many completions a generator needs by each way of giving credit.

    python -m experiments.credit run --patterns 67 --vocabularies 64 2048 --completions 32 512
    python -m experiments.credit report

Generator and target are random GPT-2s of 2 layers and width 64. Training ends after `--steps`. It ends earlier if a validation passes
0.99 of the pattern, or if texts have collapsed to nothing. A validation is one step of the target on 256 fresh samples of held-out
prompts. Each run adds a line to `experiments/results/credit.jsonl`. A run that has its line is not repeated. `report` prints the table.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experiments import common
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.publishing.outcome import markdown_table
from trl_dpg.testing import ONE_SPECIAL_TOKEN, tiny_prompts


RESULTS = Path(__file__).parent / "results" / "credit.jsonl"
BOUNDS = (0.85, 0.95, 0.99)
VALIDATED = 256  # samples
FIELDS = ["pattern", "vocabulary", "completions", "least_length", "assignment", "discount", "candidates", "seed"]


def train(steps: int, every: int, **settings) -> dict:
    """One run: its validations, completions and seconds."""
    words, seed = settings["vocabulary"] - len(ONE_SPECIAL_TOKEN), settings["seed"]
    metric = LMHeadPattern.sixty_seven() if settings["pattern"] == "67" else LMHeadPattern.qr(common.QR_TEXT)
    config = {
        "seed": seed,
        "max_steps": steps,
        "credit_assignment": settings["assignment"],
        "credit_discount": settings["discount"],
        "credit_candidates": settings["candidates"],
        "per_device_train_batch_size": settings["completions"],
        "per_device_eval_batch_size": VALIDATED,
        "num_generations": 4,
        "num_iterations": 1,  # a step is a batch, so that completions can be counted
        "generation_kwargs": {"min_new_tokens": settings["least_length"]},
        "lr_scheduler_type": "constant",
    }
    prompts = tiny_prompts(4096, 64, num_words=min(words, 60))
    with common.trainer_of(common.target_of(seed, words), metric, prompts, words, **config) as trainer:
        validation = common.Validate(trainer, every, VALIDATED, enough=BOUNDS[-1])
        trainer.add_callback(validation)
        start, collapsed = time.perf_counter(), False
        try:
            trainer.train()
        except ValueError as error:
            if "empty or one token long" not in str(error):
                raise
            collapsed = True
        seconds = round(time.perf_counter() - start, 1)
    curve = [(row["step"], round(row["eval_pixel_accuracy"], 4)) for row in validation.curve]
    return {"curve": curve, "steps": trainer.state.global_step, "collapsed": collapsed, "seconds": seconds}


def reached(run: dict, bound: float) -> int | None:
    """Completions until a validation first passed a bound."""
    return next((step * run["completions"] for step, accuracy in run["curve"] if accuracy > bound), None)


def grid(options: argparse.Namespace) -> Iterator[dict]:
    """Settings of the wanted runs, without settings that have no effect on a way of giving credit."""
    for values in itertools.product(
        options.patterns, options.vocabularies, options.completions, options.least_lengths, options.assignments,
        options.discounts, options.candidates, options.seeds,
    ):  # fmt: skip
        settings = dict(zip(FIELDS, values, strict=True))
        if settings["assignment"] == "sequence":
            settings["discount"] = 1.0
        if settings["assignment"] != "expected":
            settings["candidates"] = None
        yield settings


def run(options: argparse.Namespace) -> None:
    one = partial(train, steps=options.steps, every=options.every)
    common.run_missing(RESULTS, grid(options), one, options.threads, least_length=0)


def report(options: argparse.Namespace) -> None:
    names = "pattern, words, completions a step, least length, credit, γ, candidates, seeds".split(", ")
    names += [*(f"to {bound}" for bound in BOUNDS), "best"]
    rows = [names]
    runs = [{"least_length": 0, **line} for line in common.lines_of(RESULTS)]
    keys = sorted(
        {tuple(str(r[name]) for name in FIELDS[:-1]) for r in runs}, key=lambda k: (k[0], int(k[1]), int(k[2]), k[3:])
    )
    for key in keys:
        same = [r for r in runs if tuple(str(r[name]) for name in FIELDS[:-1]) == key]
        cells = [median(same, bound) for bound in BOUNDS]
        best = statistics.median(max((accuracy for _, accuracy in r["curve"]), default=0.5) for r in same)
        unset = "all" if key[4] == "expected" else ""
        name = [unset if value == "None" else value for value in key]
        rows.append([*name, str(len(same)), *cells, f"{best:.3f}"])
    print(markdown_table(rows))


def median(runs: list[dict], bound: float) -> str:
    """Median over seeds of the completions to a bound. A run that never passed the bound counts as the longest."""
    found = sorted(reached(r, bound) or float("inf") for r in runs)
    middle = statistics.median_low(found)
    if middle < float("inf"):
        return f"{middle:,}"
    longest = max(r["steps"] * r["completions"] for r in runs)
    collapsed = sum(r.get("collapsed", False) for r in runs)
    return f"not in {longest:,}" + (f", {collapsed} collapsed" if collapsed else "")


def main() -> None:
    parser, runner = common.commands(__doc__.splitlines()[1], run, report)
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
