"""
Prints a Markdown table of what metagradients cost, divided by plain training on the same data by the same code. Compares with
bergson 2.5.1 (MAGIC) and with autograd through the unrolled run.

    python -m benchmarks.cost --model gpt2-shaped --peers > benchmarks/results/cost_gpt2-shaped.md
    python -m benchmarks.cost --model gpt2-shaped --lm_head --steps 1 > benchmarks/results/cost_lm_head.md

A round of a large model takes half an hour. With `--rounds FILE`, each round is kept in a file when it ends, and the table covers all
rounds of this machine in the file. So rounds can be run in parts.
"""

import argparse
import copy
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import load, make_args, make_examples, with_lora
from benchmarks.peers.environment import bergson_metagradients
from benchmarks.peers.unrolled import unrolled_metagradients
from trl_dpg import untie_lm_head
from trl_dpg.metagradients import compute_metagradients, train_and_measure
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm
from trl_dpg.publishing.facts import describe_machine


BERGSON = "bergson 2.5.1, MAGIC"

# (steps K, batch size, tokens per example). Some work does not grow with the tokens of a step: elementwise work on all parameters,
# and the metric's gradient. Its share is largest at K = 1.
SETTINGS = {
    "cpu": {
        "gpt2-shaped": [(1, 8, 64), (1, 32, 64), (8, 16, 64), (8, 32, 64), (32, 32, 64)],
        "smollm2": [(1, 8, 32), (1, 32, 64), (8, 16, 64), (8, 32, 64), (32, 12, 64), (32, 16, 64), (32, 32, 64)],
    },
    "cuda": {  # enough to keep it busy
        "gpt2": [(1, 8, 512), (8, 8, 512), (32, 4, 512)],
        "smollm2": [(1, 32, 128), (8, 32, 128), (32, 16, 128)],
    },
}

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    parser.add_argument("--model", help="gpt2-shaped (on a GPU: gpt2) or smollm2")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 32], help="only these K")
    parser.add_argument("--repeats", type=int, default=5, help="rounds to run")
    parser.add_argument("--rounds", type=Path, help="file that keeps rounds, one JSON object per line")
    parser.add_argument("--tape", default="auto")
    parser.add_argument("--tokens", type=int, nargs="+", help="only steps of so many tokens")
    parser.add_argument("--skip", nargs="+", default=[], help="methods whose names contain one of these words")
    parser.add_argument("--lora", action="store_true", help="only methods with LoRA")
    parser.add_argument(
        "--lm_head", action="store_true", help="a metric of the LM head; also where only the head is trained"
    )
    parser.add_argument("--peers", action="store_true", help="also bergson, and the unrolled run for K up to 8")
    options = parser.parse_args()
    settings = SETTINGS[options.device]
    options.model = options.model or next(iter(settings))
    if options.model not in settings:
        parser.error(f"--model {options.model}: on {options.device} there are {', '.join(settings)}")
    if any(word in "LoRA, plain" and word != "LoRA" for word in options.skip):
        parser.error("--skip: all other methods are compared with plain training")
    if options.lora and (options.peers or "LoRA" in options.skip):
        parser.error("--lora: peers train all parameters, and with `--skip LoRA` nothing is left")

    if options.lm_head and (options.peers or options.lora or options.rounds is not None):
        parser.error("--lm_head: not with --peers, --lora or --rounds, whose rows are of another metric")

    keep_freed_memory()
    machine = describe_machine(torch.device(options.device))
    if options.rounds is not None:
        options.rounds.touch()
    print(f"{machine}\n")
    print(
        f"{options.model}, AdamW, float32, tape {options.tape}; the metric is {'the norm of the LM head' if options.lm_head else 'the likelihood of 16 tokens'}. Seconds: median of the rounds, in each of "
        "which every method runs once. Ratio: median over the rounds of the seconds over those of plain training in the same "
        "round, by the same code without tape and adjoint (for bergson: by its own code, too, in brackets)."
    )
    print("\n| K | tokens a step | method | tape | rounds | seconds | over plain training | lowest, highest |")
    print("|---" * 8 + "|", flush=True)
    model = load(options.model, options.device)
    lora = with_lora(load(options.model, options.device))
    queries = make_examples(options.model, 1, 16, skip=4096)  # cheap beside a step
    metric: Any = LanguageModelingLikelihood(queries)
    if options.lm_head:
        metric = LMHeadNorm()
        untie_lm_head(model)
        options.skip = [*options.skip, "LoRA"]
    for num_steps, batch_size, length in settings[options.model]:
        tokens = batch_size * length
        if num_steps not in options.steps or (options.tokens is not None and tokens not in options.tokens):
            continue
        new = measure(options, model, lora, metric, queries, num_steps, batch_size, length)
        if options.rounds is None:
            done = list(new)
        else:
            for done_now in new:
                with options.rounds.open("a") as file:
                    print(json.dumps({"machine": machine, **done_now}), file=file)
            key = machine, options.model, num_steps, tokens
            kept = map(json.loads, options.rounds.read_text().splitlines())
            done = [r for r in kept if (r["machine"], r["model"], r["K"], r["tokens"]) == key]
        for row in rows(done):
            print(row, flush=True)


def keep_freed_memory() -> None:
    """
    Has glibc keep the memory of large tensors for the next ones, as PyTorch does on a GPU, rather than give it back.

    On a virtual machine whose host takes freed memory away, every page of it is slow to get back: one would time the host, and
    most of all for methods that keep a tape.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def measure(options, model, lora, metric, queries, num_steps, batch_size, length) -> Iterator[dict[str, Any]]:
    """Seconds of rounds. Every method runs once in each round."""
    examples = make_examples(options.model, batch_size * num_steps, length)
    exact = make_args(options.model, num_steps, batch_size=batch_size, max_length=length, tape=options.tape)
    central = replace(exact, curvature="central_difference")
    methods: dict[str, Callable[[list], Any]] = {
        "plain": lambda examples: train_and_measure(model, examples, metric, exact),
        "exact": lambda examples: compute_metagradients(model, examples, metric, exact),
        "central differences": lambda examples: compute_metagradients(model, examples, metric, central),
        "LoRA, plain": lambda examples: train_and_measure(lora, examples, metric, exact),
        "LoRA, exact": lambda examples: compute_metagradients(lora, examples, metric, exact),
        "LoRA, central differences": lambda examples: compute_metagradients(lora, examples, metric, central),
    }
    if options.peers and num_steps <= 8:
        methods["autograd through the unrolled run"] = lambda examples: unrolled_metagradients(
            model, examples, metric, exact
        )
    if options.lm_head and num_steps == 1:
        head = copy.deepcopy(model).requires_grad_(False)
        head.lm_head.requires_grad_(True)
        methods["LM head alone, exact"] = lambda examples: compute_metagradients(head, examples, metric, exact)
    if options.lora:
        methods = {name: method for name, method in methods.items() if name.startswith("LoRA")}
    methods = {name: method for name, method in methods.items() if not any(word in name for word in options.skip)}
    for method in methods.values() if options.repeats > 0 else ():
        method(examples[: 2 * batch_size])  # to warm up: a step with a second derivative takes the most memory
    for _ in range(options.repeats):
        seconds, fallbacks, tapes, own_training = {}, {}, {}, None
        for name, method in methods.items():
            start = time.perf_counter()
            result = method(examples)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
            print(f"K = {num_steps}, {name}: {seconds[name]:.2f} s", file=sys.stderr, flush=True)
            if "central" in name:
                fallbacks[name] = result.num_exact_fallbacks
            if "plain" not in name and "autograd" not in name and result.plan is not None:
                tapes[name] = result.plan.tape
            del result
        if options.peers:
            out = bergson_metagradients(model, examples, queries, exact)
            (seconds[BERGSON],), (own_training,) = out["seconds"], out["train_seconds"]
        yield {
            "model": options.model,
            "K": num_steps,
            "tokens": batch_size * length,
            "seconds": seconds,
            "fallbacks": fallbacks,
            "tapes": tapes,
            "own_training": own_training,
        }


def rows(rounds: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table. A method's figures come from the rounds in which it ran."""
    for name, tape in dict.fromkeys((name, r["tapes"].get(name)) for r in rounds for name in r["seconds"]):
        of_method = [r for r in rounds if name in r["seconds"] and r["tapes"].get(name) == tape]
        seconds = [r["seconds"][name] for r in of_method]
        plain = "LoRA, plain" if name.startswith("LoRA") else "plain"
        ratios = [r["seconds"][name] / r["seconds"][plain] for r in of_method]
        ratio = f"{statistics.median(ratios):.2f}"
        if name == BERGSON:
            ratio += f" ({statistics.median(r['seconds'][name] / r['own_training'] for r in of_method):.2f})"
        if "central" in name:
            ratio += f"; {max(r['fallbacks'][name] for r in of_method)} steps repeated exactly"
        yield (
            f"| {rounds[0]['K']} | {rounds[0]['tokens']} | {name} | {tape or ''} | {len(seconds)} | {statistics.median(seconds):.2f} | "
            f"{ratio} | {min(ratios):.2f}, {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
