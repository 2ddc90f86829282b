"""Derivatives of one step's loss: the gradient in the forward sweep, and derivatives along \\( \\lambda_g \\) in the adjoint sweep."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.examples import MicroBatch
from ..runtime.host import double
from ..runtime.workspace import Workspace
from .loss import TokenLosses


def gradient(
    losses: TokenLosses,
    space: Workspace,
    batches: list[MicroBatch],
    example_losses: Tensor,
    before_backward: Callable[[], None],
) -> float:
    r"""
    Accumulates the gradient \\( g_t = \nabla_\phi L_t(\phi_t; w) \\) of micro-batches, and returns their loss. Writes
    \\( \ell_i(\phi_t) / Z_t \\) to `example_losses`, shape `(n,)`. Takes about as long as 3 forward passes.
    """
    total = 0.0
    for batch in batches:
        values = losses(batch)
        before_backward()
        values.backward(batch.token_weights(), inputs=space.params)
        examples = batch.example_sums(values.detach()[:, 0])
        example_losses[batch.indices] = examples
        total += torch.dot(examples, double(batch.weights)).item()
    return total


class Direction(NamedTuple):
    r"""The cotangent \\( \lambda_g \\) of a step's gradient, with two results of the forward sweep at that step."""

    vector: Tensor  # lambda_g, shape (size,)
    dot_with_grad: float  # <lambda_g, g_t>
    example_losses: Tensor  # losses of all examples, shape (n,)


@dataclass
class LossDifferentiator(ABC):
    """
    Differentiates a batch's loss a second time.

    Attributes:
        token_losses ([`TokenLosses`]): The losses.
        space ([`Workspace`]): Parameters, and what is accumulated into them.
        errors (`list[float]`): Estimated relative error of each step, the last step first. 0 for a step that was repeated with exact
            derivatives. Empty if all derivatives are exact.
        num_fallbacks (`int`): Number of steps that were repeated with exact derivatives.
    """

    token_losses: TokenLosses
    space: Workspace
    errors: list[float] = field(default_factory=list)
    num_fallbacks: int = 0

    @abstractmethod
    def __call__(self, batches: list[MicroBatch], direction: Direction, product: Tensor | None) -> list[Tensor]:
        r"""
        Derivatives of the losses of this process's micro-batches along \\( \lambda_g \\), at the current values of the parameters.

        Returns \\( \langle \nabla_\phi \ell_{ij}(\phi_t), \lambda_g \rangle / Z_t \\) for each micro-batch, shape `(t, 1 + k)`. Column 0
        belongs to the `t` supervised tokens, the other columns to their `k` candidates. Writes \\( H_t \lambda_g \\) over all processes
        to `product`, shape `(size,)`, if it is not `None`.
        """
