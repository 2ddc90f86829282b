"""
Compares a generator that was trained for several ways of fine-tuning with one that was trained for a single way.

    python -m experiments.variants run
    python -m experiments.variants report

The goal is the QR code of `tiny_qr`. One generator is trained for one step of the target (`"recipe"`), one for the mean over four
recipes of one to ten steps (`"variants"`). Each then writes 4,096 texts. TRL's stock `SFTTrainer` fine-tunes fresh targets on them: for longer, at
other learning rates, in other orders, with other batch sizes. The target of the first of these runs is also rounded to 8 and 4 bits, and
pruned by setting a tenth of each matrix to zero. The picture is read from the two models. Each run adds a line to
`experiments/results/variants.jsonl`. A run that has its line is not repeated. `report` prints the table.
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from experiments import common
from experiments.robustness import pruned, rounded
from trl_dpg.publishing.outcome import markdown_table


RESULTS = Path(__file__).parent / "results" / "variants.jsonl"
TRAINED = {
    "recipe": None,
    "variants": [  # of 512 completions: one, four and ten steps
        {},
        {"batch_size": 128, "seed": 1},
        {"batch_size": 52, "seed": 2},
        {"batch_size": 52, "seed": 3, "learning_rate": 3e-4},
    ],
}
RUNS: dict[str, dict[str, Any]] = {
    "8 steps": {},
    "80 steps": {"num_train_epochs": 10},
    "learning rate × 10": {"learning_rate": 10 * common.SFT_LEARNING_RATE},
    "learning rate × 30": {"learning_rate": 30 * common.SFT_LEARNING_RATE},
    "learning rate ÷ 10": {"learning_rate": common.SFT_LEARNING_RATE / 10},
    "another order": {"seed": 1},
    "a third order": {"seed": 2},
    "64 a step (64 steps)": {"per_device_train_batch_size": 64},
    "2,048 a step (2 steps)": {"per_device_train_batch_size": 2048},
}
AFTERWARDS = {
    "8 bit": lambda model: rounded(model, 8),
    "4 bit": lambda model: rounded(model, 4),
    "a tenth pruned": lambda model: pruned(model, 0.1),
}


def one(seed: int, generator: str, steps: int, completions: int, samples: int) -> dict:
    """Trains one generator, and measures the effect of its texts in each run."""
    config = {"max_steps": steps, "per_device_train_batch_size": completions, "target_variants": TRAINED[generator]}
    texts, seconds = common.texts_of_generator(seed, samples, **config)
    line, target, rows = {"seconds": seconds}, common.target_of(seed), Dataset.from_dict({"text": texts})
    for name, changes in RUNS.items():
        model = common.sft(target, common.tokenizer(), rows, **changes)
        line[name] = common.decoded(target, model)
        if not changes:
            line |= {what: common.decoded(target, treat(model)) for what, treat in AFTERWARDS.items()}
    return line


def report() -> None:
    lines = common.lines_of(RESULTS)
    found = {name: [line for line in lines if line["generator"] == name] for name in TRAINED}
    rows = [["stock SFT", *(f"trained for the {name}" for name in found)]]
    rows += [
        [name, *(common.cell([line[name] for line in same]) for same in found.values())]
        for name in [*RUNS, *AFTERWARDS]
    ]
    seconds = [f"{max((line['seconds'] for line in same), default=0):.0f}" for same in found.values()]
    print(markdown_table([*rows, ["seconds of training", *seconds]]))
    print("\nMedian (range) of the pixel accuracy over seeds, and how many a QR reader reads.")


if __name__ == "__main__":
    common.commands_for_generators(sys.modules[__name__], "generator", list(TRAINED))
