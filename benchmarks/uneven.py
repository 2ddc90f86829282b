"""
Prints a Markdown table of what a token costs if texts are of uneven length.

    python -m benchmarks.uneven > benchmarks/results/uneven.md

Lengths are uniform from 16 to 128 tokens. Even texts have as many tokens in all. In "one micro-batch", texts of all lengths share a forward
pass. All three are measured in turns, in one process.
"""

import argparse
import random
import statistics
import time
from unittest.mock import patch

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.runtime import examples as engine_examples
from trl_dpg.metrics import LanguageModelingLikelihood


SHORTEST, LONGEST, BATCH_SIZE, VOCABULARY = 16, 128, 64, 4096


def texts(lengths: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4, "tie_word_embeddings": False}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LONGEST, **sizes))
    metric = LanguageModelingLikelihood(texts([16]))
    rng = random.Random(0)
    print(
        f"A random GPT-2 of 5.3M parameters, {BATCH_SIZE} texts a step, on {torch.get_num_threads()} threads, float32."
    )
    print(
        f"Microseconds per real token: medians of {repeats} rounds. Ratios to even texts: medians, lowest, highest.\n"
    )
    print("| K | curvature | even | uneven | ratio | uneven, one micro-batch | ratio |\n|---|---|---|---|---|---|---|")
    for num_steps in (1, 4):
        lengths = [rng.randint(SHORTEST, LONGEST) for _ in range(BATCH_SIZE * num_steps)]
        even, uneven = texts([round(statistics.mean(lengths))] * len(lengths)), texts(lengths)
        for curvature in ("exact", "central_difference"):
            args = TargetTrainingArguments(
                learning_rate=1e-5, batch_size=BATCH_SIZE, curvature=curvature, disable_tqdm=True
            )
            rounds = []
            for _ in range(repeats + 1):
                row = [microseconds(model, even, metric, args), microseconds(model, uneven, metric, args)]
                with patch.object(engine_examples, "MOST_PADDING", 1.0):
                    row.append(microseconds(model, uneven, metric, args))
                rounds.append(row)
            del rounds[0]  # to warm up
            of_even, of_uneven, of_one = (f"{statistics.median(column):.0f}" for column in zip(*rounds, strict=True))
            ratios = [ratio([row[i] / row[0] for row in rounds]) for i in (1, 2)]
            cells = [num_steps, curvature, of_even, of_uneven, ratios[0], of_one, ratios[1]]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def microseconds(model: GPT2LMHeadModel, examples: list[dict], metric: LanguageModelingLikelihood, args) -> float:
    """Microseconds of a call, for each token that is no padding."""
    start = time.perf_counter()
    compute_metagradients(model, examples, metric, args)
    return 1e6 * (time.perf_counter() - start) / sum(len(example["input_ids"]) for example in examples)


def ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
