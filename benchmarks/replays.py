"""
Prints a Markdown table of how many updates a tape replays on the way back, and how much it holds, for some numbers of steps.

    python -m benchmarks.replays > benchmarks/results/replays.md
"""

import torch

from trl_dpg.metagradients import TargetTrainingArguments
from trl_dpg.metagradients.method.tape import Cotangent, StepInputs, Tape, tape_tensors
from trl_dpg.metagradients.method.updates import SGD, AdamW, Update
from trl_dpg.metagradients.method.updates.optimizer import Block, Optimizer
from trl_dpg.metagradients.runtime.storage import Storage


STEPS = [2, 8, 9, 10, 16, 20, 28, 29, 30, 32, 64, 96, 200, 1000]


def replays(rule: type[Update], num_steps: int) -> int:
    """Number of replayed updates in a run of a single parameter."""
    count = 0

    class Counting(rule):  # type: ignore[misc, valid-type]
        def update_(self, *args) -> None:
            nonlocal count
            count += 1

    block = Block(slice(0, 1), Counting(TargetTrainingArguments(), 0.0, 1e-9, torch.Size((1,))))
    optimizer = Optimizer([block], [0.1] * num_steps, max_grad_norm=0.0)
    tape = Tape(optimizer, [block], num_steps, torch.Tensor.zero_, Storage())
    state = tuple(torch.zeros(1) for _ in range(rule.num_states))
    for _ in range(num_steps):
        tape.push(StepInputs(torch.zeros(1), state, torch.ones(1)))
    cotangent = Cotangent(torch.zeros(1), tape)
    for _ in range(num_steps):
        optimizer.adjoint_(tape, torch.zeros(1), cotangent, torch.zeros(1))
        tape.pop()
    return count


def main() -> None:
    print(
        "On the way back: updates replayed a step, and the most that a tape holds, in trained parameters a step, beside the cotangents of AdamW's moments.\n"
    )
    print("| K | AdamW, updates | AdamW, tape | SGD, updates | SGD, tape |")
    print("|---" * 5 + "|")
    for num_steps in STEPS:
        cells = []
        for rule in (AdamW, SGD):
            cells.append(f"{replays(rule, num_steps) / num_steps:.1f}")
            cells.append(f"{tape_tensors(num_steps, rule.num_states) / num_steps:.2f}")
        print(f"| {num_steps} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
