"""
Prints, as a Markdown table, the cosine and the relative error of float32 metagradients to float64 ones: exact, by central
differences, and under bfloat16 autocast.

    python -m benchmarks.precision > benchmarks/results/precision.md
"""

import argparse

import torch

from benchmarks.common import load, machine, make_args, make_examples
from trl_dpg.metagradients import compute_metagradients
from trl_dpg.metrics import LanguageModelingLikelihood


METHODS = {
    "exact": {},
    "central differences": {"curvature": "central_difference"},
    "exact, bf16 autocast": {"bf16": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["gpt2-shaped", "smollm2"])
    options = parser.parse_args()
    print(f"{machine(options.device)}\n")
    print(
        "AdamW, learning rate 1e-5. The metric is the likelihood of other texts. Reference: exact, float64. Estimate: the "
        "largest of the steps' estimated errors; the steps above 1e-2 are repeated exactly.\n"
    )
    print("| model | K | epsilon_root | method | 1 - cosine | relative error | estimate | steps repeated |")
    print("|---" * 8 + "|")
    for name in options.models:
        batch_size, length, all_steps = {"gpt2-shaped": (4, 64, (1, 8, 32)), "smollm2": (2, 32, (1, 4))}[name]
        metric = LanguageModelingLikelihood(make_examples(name, 4, length, skip=2000))
        for num_steps in all_steps:
            examples = make_examples(name, batch_size * num_steps, length)
            for epsilon_root in (1e-9, "auto"):
                common = {"adam_epsilon_root": epsilon_root, "num_steps": num_steps}
                args = make_args(name, **common)
                args.batch_size, args.max_length = batch_size, length
                double = load(name, options.device, torch.float64)
                expected = compute_metagradients(double, examples, metric, args).metagradients.double()
                del double
                model = load(name, options.device)
                for method, fields in METHODS.items():
                    args = make_args(name, **common, **fields)
                    args.batch_size, args.max_length = batch_size, length
                    out = compute_metagradients(model, examples, metric, args)
                    actual = out.metagradients.double()
                    cosine = torch.dot(actual, expected) / (actual.norm() * expected.norm())
                    error = (actual - expected).norm() / expected.norm()
                    estimate = f"{max(out.curvature_errors):.0e}" if out.curvature_errors else ""
                    repeated = out.num_exact_fallbacks if out.curvature_errors else ""
                    print(
                        f"| {name} | {num_steps} | {epsilon_root} | {method} | {1 - cosine:.1e} | {error:.1e} | {estimate} | "
                        f"{repeated} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
