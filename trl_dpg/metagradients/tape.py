"""What the forward sweep keeps for the adjoint sweep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .optimizers import Moments, Optimizer
from .storage import Storage


OVERHEAD = 0.1  # of the gradients' own size, for states
TENSORS_OF_A_STATE = {"adamw": 3, "sgd": 1}


def tape_tensors(num_steps: int, optim: str) -> int:
    """The most tensors of the size of the trained parameters that a [`Tape`] ever holds."""
    states = int(OVERHEAD * num_steps) // TENSORS_OF_A_STATE[optim]
    return num_steps + states * TENSORS_OF_A_STATE[optim]


class Tape:
    r"""
    Record of a training run that can be walked backwards.

    Every step's gradient is kept. A state (parameters and, for AdamW, two moments) is kept only where there is room for it
    within 1.1 times the gradients' size; all others are rebuilt from the nearest kept one, or from the original parameters,
    by replaying the elementwise updates: no model call, and equal to the last bit. Gradients that were walked over make room
    for more states. So the forward sweep keeps the first one late, at three quarters of the way, and a replay keeps one at a
    third of its way, a third of what remains, and so on: about three updates a step at most, with AdamW up to seven for K from
    10 to 29, where there is room for none at first.

    On the way back all of this goes through the parameters block by block: of what lies elsewhere, only a few blocks are in
    memory at a time. There, too, lie the cotangents of AdamW's moments while the model is called, which does not need them.

    Args:
        optimizer ([`Optimizer`]):
            The update rule to replay.
        num_steps (`int`):
            Steps K of the run.
        load_originals (`Callable`):
            Writes this process's part of the parameters before the first step into a tensor of shape `(n,)`.
        storage ([`Storage`]):
            Where tensors are kept.
    """

    def __init__(
        self, optimizer: Optimizer, num_steps: int, load_originals: Callable[[Tensor], None], storage: Storage
    ):
        self.optimizer = optimizer
        self.num_steps = num_steps
        self.load_originals = load_originals
        self.storage = storage
        # Keys of blocks: of a gradient one each, of a state one for every tensor
        self.gradients: list[list[Any]] = []
        self.states: list[tuple[int, list[list[Any]]]] = []  # (step before which it holds, its blocks), in order
        self._aside: list[list[Any]] = []  # cotangents of both moments
        self._clipped: list[Any] = []  # the last gradient, if its clipping is still to be walked back
        self._blocks: list[tuple[slice, Optimizer]] = []
        self._moments: Moments | None = None
        self._limit = tape_tensors(num_steps, optimizer.optim)
        self._next_kept = -(-3 * num_steps // 4)

    def record(self, state: list[Tensor], gradient: Tensor) -> None:
        """
        Keeps a step's gradient, which is taken over, and now and then the state before the step, which is copied: parameters
        and moments.
        """
        step = len(self.gradients)
        if step == 0:
            self._blocks = list(self.optimizer.blocks(gradient))
        if step == self._next_kept and self._has_room(self.num_steps, len(self.states) + 1):
            self.states.append((step, [self._keep([t[part] for t in state]) for part, _ in self._blocks]))
            self._next_kept = (step + self.num_steps + 1) // 2
        self.gradients.append(self.storage.put([gradient[part] for part, _ in self._blocks]))

    @torch.no_grad()
    def rewind(self, values: Tensor, cotangent: Tensor) -> tuple[Tensor, float, Tensor | None]:
        r"""
        Takes the last step off the tape, and walks its update back.

        Args:
            values (`Tensor`): Shape `(n,)`; the parameters before the step are written to it.
            cotangent (`Tensor`): \\( \lambda_\phi \\) after the update, shape `(n,)`; becomes that before it.

        Returns:
            `tuple[Tensor, float, Tensor | None]`: The cotangent \\( \lambda_g \\) of the gradient, up to
            [`~Tape.rewind_clipping`]; \\( \langle \lambda_g, g \rangle \\) of this process; and memory of shape `(n,)` for the
            caller's use, if there is some. It and \\( \lambda_g \\) may be the tape's, which takes them back when the next
            step is taken off; at the first step, \\( \lambda_g \\) is where `cotangent` was.
        """
        step = len(self.gradients) - 1
        start, keys = self._to_read()
        if start == 0:
            self.load_originals(values)
        if step == 0:
            self._moments = None  # zeros, and of no use afterwards
        elif self._moments is None:
            self._moments = self.optimizer.initial_moments(values)
        out = cotangent if step == 0 else self._moments.second if self._moments else torch.empty_like(cotangent)
        kept: dict[int, list[list[Any]]] = {position: [] for position in self._positions_to_keep(start, step)}
        inner = torch.zeros((), dtype=torch.float64, device=values.device)

        blocks = self.storage.stream(keys)
        last, aside, self._aside = self.gradients.pop(), self._aside, []
        for i, (part, optimizer) in enumerate(self._blocks):
            moments = None if self._moments is None else Moments(*(t[part] for t in self._moments))
            tensors = [values[part], *(moments or ())]
            if start > 0:
                for tensor in tensors:
                    tensor.copy_(next(blocks))
            else:
                for moment in moments or ():
                    moment.zero_()
            for position in range(start, step):
                optimizer.update_(position, tensors[0], moments, next(blocks))
                if position + 1 in kept:
                    kept[position + 1].append(self._keep(tensors))
            gradient = next(blocks)
            moment_cotangents: Moments | None
            if aside:
                moment_cotangents = Moments(next(blocks), next(blocks))
                self._drop(aside[i])
            else:  # nothing comes after the last step
                moment_cotangents = optimizer.initial_moments(tensors[0]) if step > 0 else None
            inner += optimizer.adjoint_(step, cotangent[part], moment_cotangents, gradient, moments, out[part])
            if not optimizer.clips(step):
                self._drop([last[i]])
            if step > 0 and moment_cotangents is not None:
                self._aside.append(self.storage.put(list(moment_cotangents)))
        self._clipped = last if self.optimizer.clips(step) else []
        self.states += kept.items()
        if step > 0 and not self._clipped:
            self.storage.expect(self._to_read()[1])
        return out, inner.item(), self._moments and self._moments.first

    def _to_read(self) -> tuple[int, list[Any]]:
        """
        For the last step: the step that its replay starts from, and keys of all that is read, block by block. Drops states that
        lie after it.
        """
        step = len(self.gradients) - 1
        while self.states and self.states[-1][0] > step:
            for keys in self.states.pop()[1]:
                self._drop(keys)
        start, state = self.states[-1] if self.states else (0, [])
        columns = [state, *([[key] for key in gradient] for gradient in self.gradients[start:]), self._aside]
        return start, [key for row in zip(*filter(None, columns), strict=True) for group in row for key in group]

    @torch.no_grad()
    def rewind_clipping(self, grad_cotangent: Tensor, inner: float) -> float:
        r"""
        Walks the clipping of the same step back. To be called where [`~Optimizer.clips`] says that there was one.

        Args:
            grad_cotangent (`Tensor`): \\( \lambda_g \\) of the clipped gradient, shape `(n,)`; becomes that before clipping.
            inner (`float`): \\( \langle \lambda_g, g \rangle \\) over all processes.

        Returns:
            `float`: \\( \langle \lambda_g, g \rangle \\), of this process, with the new one.
        """
        total = torch.zeros((), dtype=torch.float64, device=grad_cotangent.device)
        blocks = self.storage.stream(self._clipped)
        for (part, optimizer), gradient in zip(self._blocks, blocks, strict=True):
            total += optimizer.clip_adjoint_(len(self.gradients), grad_cotangent[part], gradient, inner)
        self._drop(self._clipped)
        self._clipped = []
        if self.gradients:
            self.storage.expect(self._to_read()[1])
        return total.item()

    def _positions_to_keep(self, step: int, target: int) -> list[int]:
        positions: list[int] = []
        while step < target:
            step += -(-(target - step) // 3)
            if step < target and self._has_room(target + 1, len(self.states) + len(positions) + 1):
                positions.append(step)
        return positions

    def _has_room(self, num_gradients: int, num_states: int) -> bool:
        return num_gradients + num_states * TENSORS_OF_A_STATE[self.optimizer.optim] <= self._limit

    def _keep(self, tensors: list[Tensor]) -> list[Any]:
        return self.storage.put([t.clone() for t in tensors])

    def _drop(self, keys: list[Any]) -> None:
        for key in keys:
            self.storage.drop(key)
