r"""
Prints a Markdown table of the FLOPs of metagradients, divided by those of plain training. Compares PyTorch's `FlopCounterMode` with
the formula.

    python -m benchmarks.flops > benchmarks/results/flops.md

Let a forward pass cost F. Then a plain step costs 3F.

- Exact metagradients cost 8F more at each step (double backward without the gradients of weights). At the first step it is 3F (a
  forward-mode derivative: one F for values and two for tangents). In all, this is \\( 11 / 3 - 5 / (3 K) \\) plain runs.
- Central differences cost 6F more at each step, and 2F at the first. In all, this is \\( 3 - 4 / (3 K) \\) plain runs.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import load, make_args, make_examples, with_lora
from trl_dpg.metagradients import compute_metagradients, train_and_measure
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.publishing.facts import describe_machine


FORMULAS = {
    "exact": lambda k: 11 / 3 - 5 / (3 * k),
    "central_difference": lambda k: 3 - 4 / (3 * k),
}


def count(function) -> tuple[int, Any]:
    counter = FlopCounterMode(display=False)
    with counter:
        result = function()
    return counter.get_total_flops(), result


def main() -> None:
    print(f"{describe_machine(torch.device('cpu'))}\n")
    print(
        "FLOPs over those of plain training (matrix products; gpt2-shaped, eager attention). The metric, the likelihood of 16 "
        "tokens, and its gradient are counted too, in a run of steps of 1024 tokens.\n"
    )
    print("| K | curvature | counted | formula | repeated exactly | LoRA, counted | repeated exactly |")
    print("|---" * 7 + "|")
    batch_size, length = 16, 64
    metric = LanguageModelingLikelihood(make_examples("gpt2-shaped", 1, 16, skip=4096))
    model = load("gpt2-shaped", "cpu", attn_implementation="eager")
    lora = with_lora(load("gpt2-shaped", "cpu", attn_implementation="eager"))
    for num_steps in (1, 8, 32):
        examples = make_examples("gpt2-shaped", batch_size * num_steps, length)
        for curvature, formula in FORMULAS.items():
            args = make_args("gpt2-shaped", num_steps, curvature=curvature, batch_size=batch_size)
            cells = []
            for target in (model, lora):
                plain, _ = count(lambda target=target: train_and_measure(target, examples, metric, args))  # noqa: B023
                full, out = count(lambda target=target: compute_metagradients(target, examples, metric, args))  # noqa: B023
                cells += [f"{full / plain:.2f}", str(out.num_exact_fallbacks)]
            cells.insert(1, f"{formula(num_steps):.2f}")
            print(f"| {num_steps} | {curvature} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
