"""The tape, which the forward sweep records for the adjoint sweep, and the cotangents of the adjoint sweep."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.storage import Storage
from .updates.optimizer import Block, Optimizer


OVERHEAD = 0.1  # extra room for states, as a fraction of all gradients


def tape_tensors(num_steps: int, num_states: int) -> int:
    """Most tensors that a [`Tape`] holds, each as large as the trained parameters."""
    states = int(OVERHEAD * num_steps) // (1 + num_states)
    return num_steps + states * (1 + num_states)


class StepInputs(NamedTuple):
    """Inputs of a step's update, for all parameters or for one block of them."""

    phi: Tensor
    state: tuple[Tensor, ...]
    grad: Tensor  # not clipped


@dataclass
class Tape:
    """
    Record of a training run from which every step's inputs can be restored, from the last step to the first.

    The tape keeps the gradient of every step. It also keeps a few states (parameters and optimizer state). All kept tensors together
    take at most 1.1 times the size of the gradients. The tape restores any other state by repeating updates from the nearest kept
    state, or from the original parameters. This calls no model, and the result is the same to the last bit.

    When the adjoint sweep is done with a step, the room of its gradient is used for more states. The forward sweep therefore keeps
    its first state at three quarters of the steps. On its way from a kept state, `restore` keeps one at a third of the way, at a
    third of the rest, and so on. On average, a step takes up to four repeated updates. AdamW takes up to seven at K from 10 to
    29, where no state fits at first (`benchmarks/results/replays.md`).

    All work goes block by block. Of a tape outside of the device, only a few blocks are in the device's memory at a time.
    """

    optimizer: Optimizer
    blocks: list[Block]  # parts that the tensors are kept in
    num_steps: int
    load_originals: Callable[[Tensor], None]  # writes the parameters before the first step into a flat tensor
    storage: Storage

    def __post_init__(self) -> None:
        # Storage keys: one per block of a gradient, and one per block and tensor of a state
        self.gradients: list[list[Any]] = []
        self.states: list[tuple[int, list[list[Any]]]] = []  # (step that it precedes, keys of its blocks), in order
        self._limit = tape_tensors(self.num_steps, self.optimizer.num_states)
        self._next_kept = -(-3 * self.num_steps // 4)

    @property
    def current(self) -> int:
        """Index of the step to walk back next: the last one on the tape, counted from 0."""
        return len(self.gradients) - 1

    def push(self, inputs: StepInputs) -> None:
        """Puts a step's gradient into the storage, and at some steps a copy of the parameters and optimizer state before the step."""
        step = len(self.gradients)
        if step == self._next_kept and self._has_room(self.num_steps, len(self.states) + 1):
            tensors = (inputs.phi, *inputs.state)
            self.states.append((step, [self._keep([t[part] for t in tensors], rule) for part, rule in self.blocks]))
            self._next_kept = (step + self.num_steps + 1) // 2
        self.gradients.append(self.storage.put([inputs.grad[part] for part, _ in self.blocks]))

    @torch.no_grad()
    def restore(self, phi: Tensor) -> Iterator[StepInputs]:
        """
        Restores the inputs of the current step's update, block by block. `phi`, shape `(size,)`, becomes the parameters before
        that step. States on the way are kept if there is room.
        """
        start, keys = self._to_read()
        if start == 0:
            self.load_originals(phi)
        kept: dict[int, list[list[Any]]] = {position: [] for position in self._positions_to_keep(start)}
        self.states += kept.items()  # their lists fill up in the loop below
        tensors = self.storage.stream(keys)
        for part, rule in self.blocks:
            block = phi[part]
            if start > 0:
                block.copy_(next(tensors))
                state = tuple(next(tensors).clone() for _ in range(rule.num_states))
            else:  # the first step's adjoint does not read zeros
                state = rule.zero_state(block) if self.current > 0 else ()
            for position in range(start, self.current):
                self.optimizer.update_(position, rule, block, state, next(tensors))
                if position + 1 in kept:
                    kept[position + 1].append(self._keep([block, *state], rule))
            yield StepInputs(block, state, next(tensors))

    def pop(self) -> None:
        """Removes the current step."""
        self.storage.drop(self.gradients.pop())
        if self.gradients:
            self.storage.expect(self._to_read()[1])

    def _to_read(self) -> tuple[int, list[Any]]:
        """The step where `restore` starts, and keys of all tensors it reads. Drops states that lie after that step."""
        while self.states and self.states[-1][0] > self.current:
            for keys in self.states.pop()[1]:
                self.storage.drop(keys)
        start, state = self.states[-1] if self.states else (0, [])
        # The order in which `restore` reads: for each block, first its state, then its gradients
        columns = [state, *([[key] for key in gradient] for gradient in self.gradients[start:])]
        return start, [key for row in zip(*filter(None, columns), strict=True) for group in row for key in group]

    def _positions_to_keep(self, position: int) -> list[int]:
        positions: list[int] = []
        while position < self.current:
            position += -(-(self.current - position) // 3)
            if position < self.current and self._has_room(self.current + 1, len(self.states) + len(positions) + 1):
                positions.append(position)
        return positions

    def _has_room(self, num_gradients: int, num_kept: int) -> bool:
        return num_gradients + num_kept * (1 + self.optimizer.num_states) <= self._limit

    def _keep(self, tensors: list[Tensor], rule: Any) -> list[Any]:
        return self.storage.put([t.clone() for t in tensors[: 1 + rule.num_states]])


class Cotangent:
    r"""
    \\( \lambda_\phi \\), shape `(size,)`, and \\( \lambda_s \\) between two steps of the adjoint sweep.

    Model calls do not need \\( \lambda_s \\), so it lies in the tape's storage during these calls.
    """

    def __init__(self, phi: Tensor, tape: Tape):
        self.phi, self.tape = phi, tape
        self._kept: list[list[Any]] = []

    def states(self) -> Iterator[tuple[Tensor, ...]]:
        r"""Yields \\( \lambda_s \\) block by block: zeros after the last step. The caller may write to it, and passes it to `keep`."""
        kept, self._kept = self._kept, []
        tensors = self.tape.storage.stream([key for keys in kept for key in keys])
        for i, (part, rule) in enumerate(self.tape.blocks):
            if kept:
                state = tuple(next(tensors) for _ in range(rule.num_states))
                self.tape.storage.drop(kept[i])
            else:  # in a run of one step, no adjoint reads zeros
                state = rule.zero_state(self.phi[part]) if self.tape.current > 0 else ()
            yield state

    def keep(self, state: tuple[Tensor, ...]) -> None:
        """Keeps the next block of \\( \\lambda_s \\), for [`~Cotangent.states`] of the step before."""
        self._kept.append(self.tape.storage.put(list(state)))
