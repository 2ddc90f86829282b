"""
Prints Markdown tables that compare metagradients in float32 with those in float64: exact, by central differences, and under bfloat16
autocast. Another table has the error of the gradients that all of them start from, example by example.

    python -m benchmarks.precision > benchmarks/results/precision.md
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import load, make_args, make_examples
from trl_dpg.metagradients import compute_metagradients, run
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.publishing.facts import describe_machine


METHODS = {
    "exact": {},
    "exact, training gradients of float64": {},
    "central differences": {"curvature": "central_difference"},
    "exact, bf16 autocast": {"bf16": True},
}
# examples and tokens per example of a step; steps K; steps up to which the reference is in float64
SETTINGS = {"gpt2-shaped": [(16, 64, (1, 8, 32), 32)], "smollm2": [(8, 64, (1, 4), 4), (16, 16, (1, 4), 1)]}


@contextmanager
def training_gradients(kept: list[list[Tensor]], given: bool) -> Iterator[None]:
    """Keeps the gradients of all training steps, or replaces them by those in `given`."""
    steps = iter(list(kept))
    gradient = run.accumulate_gradient

    def kept_or_given(losses, space, *rest):
        loss = gradient(losses, space, *rest)
        if given:
            for param, value in zip(space.params, next(steps), strict=True):
                param.grad.copy_(value)
        else:
            kept.append([param.grad.clone() for param in space.params])
        return loss

    run.accumulate_gradient = kept_or_given
    try:
        yield
    finally:
        run.accumulate_gradient = gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(SETTINGS))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 8, 32], help="only these K")
    parser.add_argument("--tokens", type=int, nargs="+", help="only examples of so many tokens")
    options = parser.parse_args()
    print(f"{describe_machine(torch.device(options.device))}\n")
    print(
        "AdamW, learning rate 1e-5. The metric is the likelihood of other texts. Reference: exact, float64 (for SmolLM2 on 16 x 16 "
        "tokens at K > 1 exact, float32). In rows that say so, the training run is given the gradients of the float64 run, so that the "
        "rest of the error is seen. Estimate: the largest of the steps' estimated errors; steps above 1e-2 are repeated exactly.\n"
    )
    print(
        "| model | K | examples x tokens a step | epsilon_root | method | 1 - cosine | relative error | estimate | repeated |"
    )
    print("|---" * 9 + "|")
    settings = [
        (name, *setting)
        for name in options.models
        for setting in SETTINGS[name]
        if options.tokens is None or setting[1] in options.tokens
    ]
    for name, batch_size, length, all_steps, most_double in settings:
        for num_steps in all_steps:
            if num_steps in options.steps:
                for row in rows(name, options.device, batch_size, length, num_steps, num_steps <= most_double):
                    print(row, flush=True)

    print(
        "\nRelative error (norm) of the gradient of one example's loss at the original parameters, by plain PyTorch in float32, to "
        "that in float64.\n"
    )
    print("| model | tokens of an example | examples | median | highest | of |")
    print("|---" * 6 + "|")
    for name, batch_size, length, *_ in settings:
        errors = gradient_errors(name, options.device, batch_size, length)
        worst = max(range(batch_size), key=errors.__getitem__)
        print(
            f"| {name} | {length} | {batch_size} | {median(errors):.1e} | {errors[worst]:.1e} | example {worst + 1} |",
            flush=True,
        )


def rows(name: str, device: str, batch_size: int, length: int, num_steps: int, double: bool) -> Iterator[str]:
    """Lines of the first table; `double`: with float64 as the reference."""
    metric = LanguageModelingLikelihood(make_examples(name, 4, length, skip=2000))
    examples = make_examples(name, batch_size * num_steps, length)
    for epsilon_root in (1e-9, "auto"):
        args = make_args(name, num_steps, adam_epsilon_root=epsilon_root, batch_size=batch_size, max_length=length)
        model = load(name, device, torch.float64 if double else torch.float32)
        gradients: list[list[Tensor]] = []
        with training_gradients(gradients, given=False) if double else nullcontext():
            expected = compute_metagradients(model, examples, metric, args).metagradients.double()
        model = load(name, device)
        for method, fields in METHODS.items():
            given = "of float64" in method
            if not double and (given or method == "exact"):
                continue
            with training_gradients(gradients, given=True) if given else nullcontext():
                out = compute_metagradients(model, examples, metric, replace(args, **fields))
            actual = out.metagradients.double()
            cosine = torch.dot(actual, expected) / (actual.norm() * expected.norm())
            error = (actual - expected).norm() / expected.norm()
            estimate = f"{max(out.curvature_errors):.0e}" if out.curvature_errors else ""
            repeated = out.num_exact_fallbacks if out.curvature_errors else ""
            yield (
                f"| {name} | {num_steps} | {batch_size} x {length} | {epsilon_root} | {method} | {1 - cosine:.1e} | "
                f"{error:.1e} | {estimate} | {repeated} |"
            )


def gradient_errors(name: str, device: str, num_examples: int, length: int) -> list[float]:
    """The relative error of each example's float32 gradient."""
    models = [load(name, device, dtype).eval() for dtype in (torch.float32, torch.float64)]
    errors = []
    for example in make_examples(name, num_examples, length):
        ids = torch.tensor([example["input_ids"]], device=device)
        single, double = (
            torch.autograd.grad(model(input_ids=ids, labels=ids, use_cache=False).loss, list(model.parameters()))
            for model in models
        )
        error = sum((s - d).square().sum().item() for s, d in zip(single, double, strict=True))
        errors.append(math.sqrt(error / sum(d.square().sum().item() for d in double)))
    return errors


if __name__ == "__main__":
    main()
