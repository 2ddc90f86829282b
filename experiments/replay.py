"""
Tests whether generated data still works when it is mixed with other texts.

    python -m experiments.replay run
    python -m experiments.replay report

The goal is the QR code of `tiny_qr`. One generator is trained with as many other texts as completions in every inner run, one without.
Other texts are random words. In training, they are drawn from a pool of 2,048. Each generator then writes 4,096 texts. TRL's stock
`SFTTrainer` fine-tunes fresh targets on these texts: alone, and mixed with texts of another pool that no training had. The picture is
read from the two models. Each run adds a line to `experiments/results/replay.jsonl`. A run that has its line is not repeated. `report`
prints the table.
"""

import sys
from pathlib import Path

from datasets import Dataset

from experiments import common
from trl_dpg.publishing.outcome import markdown_table


RESULTS = Path(__file__).parent / "results" / "replay.jsonl"
POOL, POOL_SEED, UNSEEN_SEED = 2048, 1, 2
MIXES = {
    "its texts alone": 0.0,
    "as many others": 0.5,
    "three times as many others": 0.75,
}  # share of other texts in SFT


def one(seed: int, ratio: float, steps: int, completions: int, samples: int) -> dict:
    """Trains one generator, and measures the effect of its texts in each mix."""
    replay = common.strangers_texts(POOL, POOL_SEED) if ratio else None
    config = {"max_steps": steps, "per_device_train_batch_size": completions, "replay_ratio": ratio}
    texts, seconds = common.texts_of_generator(seed, samples, replay, **config)
    line, target = {"seconds": seconds}, common.target_of(seed)
    for name, share in MIXES.items():
        others = common.strangers_texts(round(samples * share / (1 - share)), UNSEEN_SEED)
        rows = Dataset.from_dict({"text": texts + others})
        batch_size = round(512 / (1 - share))  # as many generated texts a step
        line[name] = common.decoded(
            target, common.sft(target, common.tokenizer(), rows, per_device_train_batch_size=batch_size)
        )
    return line


def report() -> None:
    rows = [
        ["real texts in training", "seeds", "its texts alone", *(f"and {name}" for name in list(MIXES)[1:]), "seconds"]
    ]
    lines = common.lines_of(RESULTS)
    for ratio in sorted({line["ratio"] for line in lines}):
        same = [line for line in lines if line["ratio"] == ratio]
        cells = [common.cell([line[name] for line in same]) for name in MIXES]
        rows.append([f"{ratio:.0%}", str(len(same)), *cells, f"{max(line['seconds'] for line in same):.0f}"])
    print(markdown_table(rows))
    print("\nMedian (range) of the pixel accuracy over seeds, and how many a QR reader reads.")


if __name__ == "__main__":
    common.commands_for_generators(sys.modules[__name__], "ratio", [0.0, 0.5])
