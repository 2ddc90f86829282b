r"""
Prints, as a Markdown table, the FLOPs of metagradients over those of plain training, counted by PyTorch's
`FlopCounterMode`, beside the formula.

    python -m benchmarks.flops > benchmarks/results/flops.md

With one forward pass F, a plain step costs 3F. Exact metagradients cost 9F a step more (double backward), at the first step
3F (a forward-mode derivative, one F for values and two for tangents): \\( 4 - 2 / K \\) plain runs in all. Central
differences cost 6F, at the first step 2F: \\( 3 - 4 / (3 K) \\).
"""

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import SHAPES, load, machine, make_args, make_examples, with_lora
from trl_dpg.metagradients import compute_metagradients, train_and_measure


FORMULAS = {
    "exact": lambda k: 4 - 2 / k,
    "central_difference": lambda k: 3 - 4 / (3 * k),
}


def count(function) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def metric(model):
    """Without a matrix product, so that only training is counted."""
    return -sum(p.sin().sum() for p in model.parameters() if p.requires_grad)


def main() -> None:
    print(f"{machine('cpu')}\n")
    print("FLOPs over those of plain training (matrix products; gpt2-shaped, eager attention).\n")
    print("| K | curvature | counted | formula | LoRA, counted |\n|---|---|---|---|---|")
    batch_size, length = SHAPES["gpt2-shaped"]
    model = load("gpt2-shaped", "cpu", attn_implementation="eager")
    lora = with_lora(load("gpt2-shaped", "cpu", attn_implementation="eager"))
    for num_steps in (1, 8, 32):
        examples = make_examples("gpt2-shaped", batch_size * num_steps, length)
        for curvature, formula in FORMULAS.items():
            args = make_args("gpt2-shaped", num_steps, curvature=curvature)
            ratios = []
            for target in (model, lora):
                plain = count(lambda target=target: train_and_measure(target, examples, metric, args))  # noqa: B023
                full = count(lambda target=target: compute_metagradients(target, examples, metric, args))  # noqa: B023
                ratios.append(full / plain)
            print(
                f"| {num_steps} | {curvature} | {ratios[0]:.2f} | {formula(num_steps):.2f} | {ratios[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
