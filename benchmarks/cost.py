"""
Prints, as a Markdown table, what metagradients cost over plain training on the same data by the same code, beside bergson
2.5.1 (MAGIC) and beside autograd through the unrolled run.

    python -m benchmarks.cost --model gpt2-shaped --peers > benchmarks/results/cost_gpt2-shaped.md
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import SHAPES, load, machine, make_args, make_examples, with_lora
from benchmarks.peers.environment import bergson_metagradients
from benchmarks.peers.unrolled import unrolled_metagradients
from trl_dpg.metagradients import compute_metagradients, train_and_measure
from trl_dpg.metrics import LanguageModelingLikelihood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2-shaped")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", action="store_true", help="also bergson, and the unrolled run for K up to 8")
    options = parser.parse_args()
    batch_size, length = SHAPES[options.model]

    print(f"{machine(options.device)}\n")
    print(
        f"{options.model}, {batch_size} examples of {length} tokens a step, AdamW, float32. Seconds: median of "
        f"{options.repeats} rounds, in each of which every method runs once. Ratio: median over the rounds of the seconds over "
        "those of plain training in the same round, by the same code without tape and adjoint (for bergson: by its own "
        "code, too, in brackets)."
    )
    print("\n| K | method | seconds | over plain training | lowest, highest |\n|---|---|---|---|---|", flush=True)
    model = load(options.model, options.device)
    lora = with_lora(load(options.model, options.device))
    queries = make_examples(options.model, 1, 16, skip=4096)  # cheap beside a step
    metric = LanguageModelingLikelihood(queries)
    for num_steps in options.steps:
        examples = make_examples(options.model, batch_size * num_steps, length)
        for row in rows(options, model, lora, metric, queries, examples, num_steps):
            print(row, flush=True)


def rows(options, model, lora, metric, queries, examples, num_steps):
    exact = make_args(options.model, num_steps)
    central = make_args(options.model, num_steps, curvature="central_difference")
    methods: dict[str, Callable[[], Any]] = {
        "plain": lambda: train_and_measure(model, examples, metric, exact),
        "exact": lambda: compute_metagradients(model, examples, metric, exact),
        "central differences": lambda: compute_metagradients(model, examples, metric, central),
    }
    if num_steps == 1 or (options.model == "gpt2-shaped" and num_steps <= 8):
        methods |= {
            "LoRA, plain": lambda: train_and_measure(lora, examples, metric, exact),
            "LoRA, exact": lambda: compute_metagradients(lora, examples, metric, exact),
            "LoRA, central differences": lambda: compute_metagradients(lora, examples, metric, central),
        }
    if options.peers and num_steps <= 8:
        methods["autograd through the unrolled run"] = lambda: unrolled_metagradients(model, examples, metric, exact)
    times = {name: [] for name in methods}
    own_ratios, scores = [], {}
    if options.peers:
        times["bergson 2.5.1, MAGIC"] = []
    if num_steps == 1:
        for method in methods.values():  # warm up
            method()
    for _ in range(options.repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            result = method()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            scores[name] = result
        if options.peers:
            out = bergson_metagradients(model, examples, queries, exact)
            times["bergson 2.5.1, MAGIC"] += out["seconds"]
            own_ratios.append(out["seconds"][0] / out["train_seconds"][0])
    for name, seconds in times.items():
        plain = times["LoRA, plain" if name.startswith("LoRA") else "plain"]
        ratios = [a / b for a, b in zip(seconds, plain, strict=True)]
        ratio = f"{statistics.median(ratios):.2f}"
        if name.startswith("bergson"):
            ratio += f" ({statistics.median(own_ratios):.2f})"
        if "central" in name:
            ratio += f"; {scores[name].num_exact_fallbacks} steps repeated exactly"
        yield (
            f"| {num_steps} | {name} | {statistics.median(seconds):.2f} | {ratio} | {min(ratios):.2f}, {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
