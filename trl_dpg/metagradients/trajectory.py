"""What the forward sweep keeps for the adjoint sweep."""

from collections.abc import Callable
from typing import Any

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
    by replaying the elementwise updates: no model call, and equal to the last bit. On a replay, and in the forward sweep,
    states at halves of the way are kept (bisection), so that K steps cost about \\( \tfrac{1}{2} K \log_2 K \\) updates.
    Gradients that were walked over make room for more of them.

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
        self.gradients: list[Any] = []
        self.states: list[tuple[int, list[Any]]] = []  # (step before which it holds, its tensors), in order
        self._moments: Moments | None = None
        self._aside: list[Any] = []
        self._limit = tape_tensors(num_steps, optimizer.optim)
        self._next_kept = (num_steps + 1) // 2

    def record(self, state: list[Tensor], gradient: Tensor) -> None:
        """
        Keeps a step's gradient, which is taken over, and now and then the state before the step, which is copied: parameters
        and moments.
        """
        step = len(self.gradients)
        if step == self._next_kept and self._has_room(self.num_steps):
            self._keep(step, state)
            self._next_kept = (step + self.num_steps + 1) // 2
        self.gradients.append(self.storage.put(gradient))

    def set_aside(self, cotangents: Moments) -> None:
        """
        Keeps the cotangents of the moments where the tape lies, until the next [`~Tape.rewind`]: a model call, which does not
        need them, then has their memory.
        """
        self._aside = [self.storage.put(t) for t in cotangents]

    def rewind(self, values: Tensor) -> tuple[Moments | None, Tensor, Moments | None]:
        """
        Takes the last step off the tape: writes the parameters before it into `values`, shape `(n,)`, and returns the moments
        before it (`None` for zeros), its gradient, and what was set aside. The caller owns all of it.
        """
        return *self._rewind(values), self._take_back()

    def _rewind(self, values: Tensor) -> tuple[Moments | None, Tensor]:
        target = len(self.gradients) - 1
        while self.states and self.states[-1][0] > target:
            self._drop_last_state()
        if target == 0:
            self._moments = None
            self.load_originals(values)
            return None, self._pop_gradient()  # moments of zeros
        step, moments = self._load_last_state(values)
        while step < target:
            middle = (step + target + 1) // 2
            for position in range(step, middle):
                gradient = self.storage.get(self.gradients[position], ahead=self.gradients[position + 1])
                self.optimizer.update_(position, values, moments, gradient)
            step = middle
            if step < target and self._has_room(len(self.gradients)):
                self._keep(step, [values, *(moments or ())])
        return moments, self._pop_gradient()

    def _pop_gradient(self) -> Tensor:
        return self._pop(self.gradients.pop())

    def _take_back(self) -> Moments | None:
        if not self._aside:
            return None
        first, second = self._aside
        self._aside = []
        return Moments(self._pop(first, ahead=second), self._pop(second))

    def _pop(self, key: Any, ahead: Any = None) -> Tensor:
        tensor = self.storage.get(key, ahead)
        self.storage.drop(key)
        return tensor

    def _has_room(self, num_gradients: int) -> bool:
        states = (len(self.states) + 1) * TENSORS_OF_A_STATE[self.optimizer.optim]
        return num_gradients + states <= self._limit

    def _keep(self, step: int, state: list[Tensor]) -> None:
        self.states.append((step, [self.storage.put(t.clone()) for t in state]))

    def _load_last_state(self, values: Tensor) -> tuple[int, Moments | None]:
        moments = self._moments or self.optimizer.initial_moments(values)
        if values.device.type == "cpu":
            self._moments = moments  # there, memory from the operating system costs more than the arithmetic
        if not self.states:
            self.load_originals(values)
            for moment in moments or ():
                moment.zero_()
            return 0, moments
        step, keys = self.states[-1]
        for tensor, key in zip([values, *(moments or ())], keys, strict=True):
            tensor.copy_(self.storage.get(key))
        return step, moments

    def _drop_last_state(self) -> None:
        for key in self.states.pop()[1]:
            self.storage.drop(key)
