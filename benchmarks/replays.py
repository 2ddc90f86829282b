"""
Prints, as a Markdown table, how many updates a tape replays on the way back, and how much it holds, for some numbers of steps.

    python -m benchmarks.replays > benchmarks/results/replays.md
"""

from unittest import mock

import torch

from trl_dpg.metagradients.optimizers import Hyperparameters, Optimizer
from trl_dpg.metagradients.storage import DeviceStorage
from trl_dpg.metagradients.tape import Tape, tape_tensors


STEPS = [2, 8, 9, 10, 16, 20, 28, 29, 30, 32, 64, 96, 200, 1000]


def replays(optim: str, num_steps: int) -> int:
    """Updates that are replayed in all, on a run of a single parameter."""
    table = [Hyperparameters(k + 1, 0.1, 0.0, 0.9, 0.999, 1e-8, 1e-9) for k in range(num_steps)]
    optimizer = Optimizer(optim, table, num_decayed=0, max_grad_norm=0.0)
    tape = Tape(optimizer, num_steps, torch.Tensor.zero_, DeviceStorage())
    values = torch.zeros(1)
    state = [values, *(optimizer.initial_moments(values) or ())]
    for _ in range(num_steps):
        gradient = torch.ones(1)
        optimizer.measure(gradient)
        tape.record(state, gradient)
    with mock.patch.object(Optimizer, "update_", autospec=True) as update:
        for _ in range(num_steps):
            tape.rewind(values, torch.zeros(1))
    return update.call_count


def main() -> None:
    print(
        "On the way back: updates replayed a step, and the most that a tape holds, in trained parameters a step, beside the cotangents of AdamW's moments.\n"
    )
    print("| K | AdamW, updates | AdamW, tape | SGD, updates | SGD, tape |")
    print("|---" * 5 + "|")
    for num_steps in STEPS:
        cells = []
        for optim in ("adamw", "sgd"):
            cells.append(f"{replays(optim, num_steps) / num_steps:.1f}")
            cells.append(f"{tape_tensors(num_steps, optim) / num_steps:.2f}")
        print(f"| {num_steps} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
