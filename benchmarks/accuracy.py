"""
Prints how far metagradients are from float64 finite differences of the whole training run, as a Markdown table.

    python -m benchmarks.accuracy > benchmarks/results/accuracy.md
"""

import platform

import torch

from tests.metagradients.test_finite_differences import (
    CASES,
    compute_metagradients,
    finite_differences,
    make_examples,
    metric,
    relative_error,
)
from trl_dpg.metagradients import TargetTrainingArguments


def main() -> None:
    print(
        f"torch {torch.__version__}, {platform.machine()}, CPU. Tiny random GPT-2, ragged and partly unsupervised examples."
    )
    print("Relative error: norm of the difference from fourth-order central differences over their norm.\n")
    print("| case | float64 metagradients |\n|---|---|")
    for name, (make_model, fields) in CASES.items():
        model, examples, args = make_model(), make_examples(), TargetTrainingArguments(**fields)
        out = compute_metagradients(model, examples, metric, args)
        print(f"| {name} | {relative_error(out.metagradients, finite_differences(model, examples, args)):.1e} |")


if __name__ == "__main__":
    main()
