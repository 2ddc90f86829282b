r"""Cotangents on their way from step to step."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


if TYPE_CHECKING:
    from ..method.tape import Tape


class Cotangent:
    r"""
    \\( \lambda_\phi \\) and \\( \lambda_s \\) between two steps.

    The model does not need \\( \lambda_s \\): while it is called, that lies in the tape's storage.

    Args:
        phi (`Tensor`): \\( \lambda_\phi \\), shape `(n,)`.
        tape ([`~trl_dpg.metagradients.method.tape.Tape`]): What it goes along.
    """

    def __init__(self, phi: Tensor, tape: "Tape"):
        self.phi = phi
        self.tape = tape
        self.blocks, self.storage = tape.blocks, tape.storage
        self._kept: list[list[Any]] = []

    def states(self) -> Iterator[tuple[Tensor, ...]]:
        r"""\\( \lambda_s \\), block by block: zeros after the last step. Each may be written to, and is to be given to `keep`."""
        kept, self._kept = self._kept, []
        tensors = self.storage.stream([key for keys in kept for key in keys])
        for i, (part, rule) in enumerate(self.blocks):
            if kept:
                state = tuple(next(tensors) for _ in range(rule.num_states))
                for key in kept[i]:
                    self.storage.drop(key)
            else:  # zeros, which nobody needs to see at the only step
                state = tuple(
                    torch.zeros_like(self.phi[part]) for _ in range(rule.num_states if self.tape.last > 0 else 0)
                )
            yield state

    def keep(self, state: tuple[Tensor, ...]) -> None:
        """Keeps the next block of what [`~Cotangent.states`] is to give at the step before."""
        self._kept.append(self.storage.put(list(state)))
