"""What the forward sweep keeps for the adjoint sweep."""

import math
from collections.abc import Sequence

from torch import Tensor

from .optimizers import Moments, Optimizer


class Tape:
    r"""
    Record of a training run that can be walked backwards.

    Every step's gradient is kept, but parameters and moments only at every `s`-th step, \\( s = \lceil \sqrt{K} \rceil \\);
    the states between are rebuilt by replaying the elementwise updates, without a model call and to the last bit. Beside
    the model this stores \\( K + 6 \sqrt{K} \\) times the trainable parameters instead of \\( 4K \\).

    Args:
        optimizer ([`Optimizer`]):
            The update rule to replay.
        num_steps (`int`):
            Steps K of the run.
    """

    def __init__(self, optimizer: Optimizer, num_steps: int):
        self.optimizer = optimizer
        self.interval = math.isqrt(num_steps - 1) + 1
        self.gradients: list[list[Tensor]] = []
        self.checkpoints: list[tuple[list[Tensor], list[Moments]]] = []
        self.segment: list[tuple[list[Tensor], list[Moments]]] = []

    def record(self, params: Sequence[Tensor], moments: list[Moments], grads: list[Tensor]) -> None:
        """Keeps the state before a step, and the step's gradient."""
        if len(self.gradients) % self.interval == 0:
            self.checkpoints.append(_copy(params, moments))
        self.gradients.append(grads)

    def rewind(self) -> tuple[list[Tensor], list[Moments], list[Tensor]]:
        """Takes the last step off the tape: parameters and moments before it, and its gradient."""
        if not self.segment:
            state = self.checkpoints.pop()
            first = len(self.checkpoints) * self.interval
            self.segment.append(state)
            for step in range(first, len(self.gradients) - 1):
                state = _copy(*state)
                self.optimizer.update_(step, *state, self.gradients[step])
                self.segment.append(state)
        params, moments = self.segment.pop()
        return params, moments, self.gradients.pop()


def _copy(params: Sequence[Tensor], moments: list[Moments]) -> tuple[list[Tensor], list[Moments]]:
    return [p.detach().clone() for p in params], [Moments(m.first.clone(), m.second.clone()) for m in moments]
