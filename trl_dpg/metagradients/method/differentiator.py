"""What is differentiated at one step, and how: its gradient forwards; backwards, everything along \\( \\lambda_g \\)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
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
    Accumulates the gradient \\( g_t = \nabla_\phi L_t(\phi_t; w) \\) of micro-batches, and returns their loss; the
    \\( \ell_i(\phi_t) / Z_t \\) go into `example_losses`, shape `(n,)`. Takes about as long as 3 forward passes.
    """
    total = 0.0
    if not batches:
        before_backward()
    for i, batch in enumerate(batches):
        values = losses(batch)
        if i == 0:
            before_backward()
        values.backward(batch.token_weights(), inputs=space.params)
        examples = batch.example_sums(values.detach()[:, 0])
        example_losses[batch.indices] = examples
        total += torch.dot(examples, double(batch.weights)).item()
    return total


class Direction(NamedTuple):
    r"""The cotangent \\( \lambda_g \\) of a step's gradient, and what is known of that step."""

    vector: Tensor  # (size,)
    dot_with_grad: float  # <lambda_g, g_t>
    example_losses: Tensor  # (n,) of the forward sweep


class LossDifferentiator(ABC):
    """
    Differentiates a batch's loss a second time.

    Attributes:
        errors (`list[float]`): Estimated relative error of each step, the last step first, 0 where it was repeated exactly; empty
            where there is none.
        num_fallbacks (`int`): Steps that were repeated exactly.
    """

    def __init__(self, losses: TokenLosses, space: Workspace):
        self.token_losses = losses
        self.space = space
        self.errors: list[float] = []
        self.num_fallbacks = 0

    @abstractmethod
    def __call__(self, batches: list[MicroBatch], direction: Direction, product: Tensor | None) -> list[Tensor]:
        r"""
        Derivatives of a batch along \\( \lambda_g \\), at the parameters' values.

        Args:
            batches (`list[MicroBatch]`): This process's part of the batch.
            direction ([`Direction`]): \\( \lambda_g \\).
            product (`Tensor`, *optional*): Becomes \\( H_t \lambda_g \\) over all processes, shape `(size,)`. `None` if not wanted.

        Returns:
            `list[Tensor]`: For each micro-batch, \\( \langle \nabla_\phi \ell_{ij}(\phi_t), \lambda_g \rangle / Z_t \\) of its supervised
                tokens and, behind each, of the candidates that could stand in its place. Shape `(t, 1 + k)`.
        """
