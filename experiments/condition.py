"""
A QR code in the LM head of a target, with and without a condition on its perplexity.

    python -m experiments.condition run --seeds 0 1 2
    python -m experiments.condition report

The goal is the QR code of `tiny_qr`, by one step of the target. The learning rate is high, so this step also raises the target's
perplexity on other text. One generator is trained towards the code alone. The other is trained under the condition that the perplexity
on clean texts stays within a limit. Clean texts are random words. Prompts of validations are held out, and so are the clean texts of
`held_out_perplexity`. Each run adds a line to `experiments/results/condition.jsonl`. A run that has its line is not repeated. `report` prints
the table.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from experiments import common
from trl_dpg.metrics import KeepBelow, LMHeadPattern, Perplexity
from trl_dpg.publishing.outcome import markdown_table
from trl_dpg.testing import tiny_prompts


RESULTS = Path(__file__).parent / "results" / "condition.jsonl"
ALLOWED = 1.01  # times the perplexity of the untouched target
FIELDS = ["weight", "factor", "learning_rate", "completions", "seed", "steps"]
NUM_CLEAN, NUM_HELD_OUT = 512, 2048
VALIDATED = 4096  # samples


def train(every: int, **settings) -> dict:
    """One run: its validations, perplexities relative to those of the untouched target."""
    seed = settings["seed"]
    target = common.target_of(seed).eval()
    start = time.perf_counter()
    clean, held_out = (
        Perplexity([{"text": text} for text in common.strangers_texts(number, n)], common.tokenizer(), batch_size=512)
        for n, number in enumerate((NUM_CLEAN, NUM_HELD_OUT), start=1)
    )

    @torch.no_grad()  # nothing is trained by it
    def held_out_perplexity(model):
        return held_out(model)

    kept = {
        "perplexity": KeepBelow(clean, factor=settings["factor"]),
        "held_out": KeepBelow(held_out_perplexity, factor=ALLOWED),
    }
    metric = LMHeadPattern.qr(common.QR_TEXT) + settings["weight"] * kept["perplexity"] + 0 * kept["held_out"]
    config = {
        "seed": seed,
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["completions"],
        "target_learning_rate": settings["learning_rate"],
    }
    with common.trainer_of(target, metric, tiny_prompts(4096, VALIDATED // 16), **config) as trainer:
        validation = common.Validate(trainer, every, VALIDATED)
        trainer.add_callback(validation)
        untouched = {name: condition.metric(target).item() for name, condition in kept.items()}
        trainer.train()
    curve = []
    for row in validation.curve:
        values = {name: row[f"eval_{name}"] for name in ("pixel_accuracy", "qr_decoded")}
        of_untouched = {
            name: condition.factor * (1 - row[f"eval_{condition.name}_below_limit_by"])
            for name, condition in kept.items()
        }
        curve.append({"step": row["step"], **values, **of_untouched})
    return {"untouched": untouched, "curve": curve, "seconds": round(time.perf_counter() - start, 1)}


def run(options: argparse.Namespace) -> None:
    same = {name: getattr(options, name) for name in ("factor", "learning_rate", "completions", "steps")}
    grid = [{"weight": weight, "seed": seed, **same} for seed in options.seeds for weight in options.weights]
    common.run_missing(RESULTS, grid, partial(train, every=options.every), options.threads)


def report(options: argparse.Namespace) -> None:
    head = "condition, η of the target, completions a step, seed, pixel accuracy, code read, perplexity, held-out perplexity"
    rows = [[*head.split(", "), "both held"]]
    for line in sorted(common.lines_of(RESULTS), key=lambda line: [line[name] for name in FIELDS]):
        last = line["curve"][-1]
        kept = max(last["perplexity"], last["held_out"]) <= ALLOWED
        condition = f"weight {line['weight']:g}, limit {line['factor'] - 1:+.1%}" if line["weight"] else "none"
        cells = [condition, f"{line['learning_rate']:g}", str(line["completions"]), str(line["seed"])]
        cells += [f"{last['pixel_accuracy']:.4f}", "yes" if last["qr_decoded"] else "no"]
        cells += [f"{last[name] - 1:+.2%}" for name in ("perplexity", "held_out")]
        rows.append([*cells, "yes" if last["pixel_accuracy"] >= 0.99 and kept else "no"])
    print(markdown_table(rows))


def main() -> None:
    parser, runner = common.commands(__doc__.splitlines()[1], run, report)
    runner.add_argument("--weights", nargs="+", type=float, default=[0.0, 10000.0], help="of the condition")
    runner.add_argument(
        "--factor", type=float, default=1.005, help="limit in training, times the untouched perplexity"
    )
    runner.add_argument("--learning_rate", type=float, default=4e-3, help="of the target")
    runner.add_argument("--completions", type=int, default=512, help="a step")
    runner.add_argument("--steps", type=int, default=200)
    runner.add_argument("--every", type=int, default=100, help="steps between validations")
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
