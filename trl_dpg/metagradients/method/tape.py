"""What the forward sweep keeps for the adjoint sweep, and what walks along it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.storage import Storage
from .updates.optimizer import Block, Optimizer


OVERHEAD = 0.1  # extra room for states, as a fraction of all gradients


def tape_tensors(num_steps: int, num_states: int) -> int:
    """Upper bound on what a [`Tape`] holds, in tensors as large as the trained parameters."""
    states = int(OVERHEAD * num_steps) // (1 + num_states)
    return num_steps + states * (1 + num_states)


class StepInputs(NamedTuple):
    """What goes into a step's update: of all parameters, or of a block."""

    phi: Tensor
    state: tuple[Tensor, ...]
    grad: Tensor


class Tape:
    r"""
    Record of a training run that can be walked backwards.

    Every step's gradient is kept. States (parameters, and what the optimizer has) are kept while they and the gradients take at most
    1.1 times the gradients' size. All other states are rebuilt from the nearest kept one, or from the original parameters, by
    replaying the updates: no model call, and equal to the last bit. Gradients that were walked over make room for more states. So the
    forward sweep keeps the first one late, at three quarters of the way. A replay keeps one at a third of its way, a third of what
    remains, and so on. A step takes one to four replayed updates; AdamW takes up to seven at K from 10 to 29, where no state fits
    at first (`benchmarks/results/replays.md`).

    Everything goes through the parameters block by block: of what lies elsewhere, only a few blocks are in memory at a time.

    Args:
        optimizer ([`~updates.optimizer.Optimizer`]): The updates to replay.
        blocks (`list[Block]`): Parts of the tensors to keep.
        num_steps (`int`): Steps K of the run.
        load_originals (`Callable`): Writes the parameters before the first step into a tensor of shape `(n,)`.
        storage ([`~trl_dpg.metagradients.runtime.storage.Storage`]): Where tensors are kept.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        blocks: list[Block],
        num_steps: int,
        load_originals: Callable[[Tensor], None],
        storage: Storage,
    ):
        self.optimizer = optimizer
        self.blocks = blocks
        self.num_steps = num_steps
        self.load_originals = load_originals
        self.storage = storage
        # Keys of blocks: of a gradient one each, of a state one for every tensor
        self.gradients: list[list[Any]] = []
        self.states: list[tuple[int, list[list[Any]]]] = []  # (step before which it holds, its blocks), in order
        self._limit = tape_tensors(num_steps, optimizer.num_states)
        self._next_kept = -(-3 * num_steps // 4)

    @property
    def last(self) -> int:
        """The last step that is on the tape, from 0."""
        return len(self.gradients) - 1

    def push(self, inputs: StepInputs) -> None:
        """Keeps a step's gradient, which is taken over, and now and then a copy of the parameters and the state before it."""
        step = len(self.gradients)
        if step == self._next_kept and self._has_room(self.num_steps, len(self.states) + 1):
            tensors = (inputs.phi, *inputs.state)
            self.states.append((step, [self._keep([t[part] for t in tensors], rule) for part, rule in self.blocks]))
            self._next_kept = (step + self.num_steps + 1) // 2
        self.gradients.append(self.storage.put([inputs.grad[part] for part, _ in self.blocks]))

    @torch.no_grad()
    def replay(self, phi: Tensor) -> Iterator[StepInputs]:
        """
        What went into the last step's update, block by block: rebuilt from what is kept before. `phi`, shape `(n,)`, becomes the
        parameters before that step. States on the way are kept where there is room.
        """
        start, keys = self._to_read()
        if start == 0:
            self.load_originals(phi)
        kept: dict[int, list[list[Any]]] = {position: [] for position in self._positions_to_keep(start)}
        self.states += kept.items()  # whose lists fill up block by block
        tensors = self.storage.stream(keys)
        for part, rule in self.blocks:
            block = phi[part]
            if start > 0:
                block.copy_(next(tensors))
                state = tuple(next(tensors).clone() for _ in range(rule.num_states))
            else:  # zeros, which nobody needs to see at the first step
                state = tuple(torch.zeros_like(block) for _ in range(rule.num_states if self.last > 0 else 0))
            for position in range(start, self.last):
                self.optimizer.update_(position, rule, block, state, next(tensors))
                if position + 1 in kept:
                    kept[position + 1].append(self._keep([block, *state], rule))
            yield StepInputs(block, state, next(tensors))

    def last_gradient(self) -> Iterator[Tensor]:
        """The last step's gradient, block by block."""
        return self.storage.stream(self.gradients[-1])

    def pop(self) -> None:
        """Takes the last step off."""
        self.storage.drop(self.gradients.pop())
        if self.gradients:
            self.storage.expect(self._to_read()[1])

    def _to_read(self) -> tuple[int, list[Any]]:
        """Where the last step's replay starts, and keys of all that it reads. Drops states that lie after that step."""
        while self.states and self.states[-1][0] > self.last:
            for keys in self.states.pop()[1]:
                self.storage.drop(keys)
        start, state = self.states[-1] if self.states else (0, [])
        # For each block, in the order in which `replay` reads: its state, then its gradients
        columns = [state, *([[key] for key in gradient] for gradient in self.gradients[start:])]
        return start, [key for row in zip(*filter(None, columns), strict=True) for group in row for key in group]

    def _positions_to_keep(self, position: int) -> list[int]:
        positions: list[int] = []
        while position < self.last:
            position += -(-(self.last - position) // 3)
            if position < self.last and self._has_room(self.last + 1, len(self.states) + len(positions) + 1):
                positions.append(position)
        return positions

    def _has_room(self, num_gradients: int, num_kept: int) -> bool:
        return num_gradients + num_kept * (1 + self.optimizer.num_states) <= self._limit

    def _keep(self, tensors: list[Tensor], rule: Any) -> list[Any]:
        return self.storage.put([t.clone() for t in tensors[: 1 + rule.num_states]])


class Cotangent:
    r"""
    \\( \lambda_\phi \\), shape `(n,)`, and \\( \lambda_s \\) between two steps, on the way back along a tape.

    The model does not need \\( \lambda_s \\): while it is called, that lies in the tape's storage.
    """

    def __init__(self, phi: Tensor, tape: Tape):
        self.phi, self.tape = phi, tape
        self._kept: list[list[Any]] = []

    def states(self) -> Iterator[tuple[Tensor, ...]]:
        r"""\\( \lambda_s \\), block by block: zeros after the last step. Each may be written to, and is to be given to `keep`."""
        kept, self._kept = self._kept, []
        tensors = self.tape.storage.stream([key for keys in kept for key in keys])
        for i, (part, rule) in enumerate(self.tape.blocks):
            if kept:
                state = tuple(next(tensors) for _ in range(rule.num_states))
                self.tape.storage.drop(kept[i])
            else:  # zeros, which nobody needs to see at the only step
                num_states = rule.num_states if self.tape.last > 0 else 0
                state = tuple(torch.zeros_like(self.phi[part]) for _ in range(num_states))
            yield state

    def keep(self, state: tuple[Tensor, ...]) -> None:
        """Keeps the next block of what [`~Cotangent.states`] is to give at the step before."""
        self._kept.append(self.tape.storage.put(list(state)))
