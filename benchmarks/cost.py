"""
Prints, as a Markdown table, what metagradients cost over plain training on the same data by the same code, beside bergson
2.5.1 (MAGIC) and beside autograd through the unrolled run.

    python -m benchmarks.cost --model gpt2-shaped --peers > benchmarks/results/cost_gpt2-shaped.md
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import load, make_args, make_examples, with_lora
from benchmarks.peers.environment import bergson_metagradients
from benchmarks.peers.unrolled import unrolled_metagradients
from trl_dpg.facts import describe_machine
from trl_dpg.metagradients import compute_metagradients, train_and_measure
from trl_dpg.metrics import LanguageModelingLikelihood


# (steps K, batch size, tokens per example): work that does not grow with the tokens of a step, elementwise on all parameters
# and the metric's gradient, counts most at K = 1
SETTINGS = {
    "gpt2-shaped": [(1, 8, 64), (1, 32, 64), (8, 16, 64), (8, 32, 64), (32, 32, 64)],
    "smollm2": [(1, 8, 32), (1, 32, 64), (8, 16, 64), (8, 32, 64), (32, 8, 32)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(SETTINGS), default="gpt2-shaped")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 32], help="only these K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="only steps of so many tokens")
    parser.add_argument("--skip", nargs="+", default=[], help="methods whose names contain one of these words")
    parser.add_argument("--peers", action="store_true", help="also bergson, and the unrolled run for K up to 8")
    options = parser.parse_args()
    if any(word in "LoRA, plain" and word != "LoRA" for word in options.skip):
        parser.error("--skip: all other methods are compared with plain training")

    print(f"{describe_machine(torch.device(options.device))}\n")
    print(
        f"{options.model}, AdamW, float32; the metric is the likelihood of 16 tokens. Seconds: median of "
        f"{options.repeats} rounds, in each of which every method runs once. Ratio: median over the rounds of the seconds over "
        "those of plain training in the same round, by the same code without tape and adjoint (for bergson: by its own "
        "code, too, in brackets)."
    )
    print("\n| K | tokens a step | method | seconds | over plain training | lowest, highest |")
    print("|---" * 6 + "|", flush=True)
    model = load(options.model, options.device)
    lora = with_lora(load(options.model, options.device))
    queries = make_examples(options.model, 1, 16, skip=4096)  # cheap beside a step
    metric = LanguageModelingLikelihood(queries)
    for num_steps, batch_size, length in SETTINGS[options.model]:
        wanted = options.tokens is None or batch_size * length in options.tokens
        if num_steps in options.steps and wanted:
            for row in rows(options, model, lora, metric, queries, num_steps, batch_size, length):
                print(row, flush=True)


def rows(options, model, lora, metric, queries, num_steps, batch_size, length):
    examples = make_examples(options.model, batch_size * num_steps, length)
    exact = make_args(options.model, num_steps, batch_size=batch_size, max_length=length)
    central = replace(exact, curvature="central_difference")
    methods: dict[str, Callable[[], Any]] = {
        "plain": lambda: train_and_measure(model, examples, metric, exact),
        "exact": lambda: compute_metagradients(model, examples, metric, exact),
        "central differences": lambda: compute_metagradients(model, examples, metric, central),
        "LoRA, plain": lambda: train_and_measure(lora, examples, metric, exact),
        "LoRA, exact": lambda: compute_metagradients(lora, examples, metric, exact),
        "LoRA, central differences": lambda: compute_metagradients(lora, examples, metric, central),
    }
    if options.peers and num_steps <= 8:
        methods["autograd through the unrolled run"] = lambda: unrolled_metagradients(model, examples, metric, exact)
    methods = {name: method for name, method in methods.items() if not any(word in name for word in options.skip)}
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
            print(f"K = {num_steps}, {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
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
            f"| {num_steps} | {batch_size * length} | {name} | {statistics.median(seconds):.2f} | {ratio} | {min(ratios):.2f}, {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
