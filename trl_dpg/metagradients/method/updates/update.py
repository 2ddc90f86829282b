"""What an update rule is."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from ..recipe import TargetTrainingArguments


class Update(ABC):
    r"""
    Update rule \\( (\phi', s') = U(\phi, s, g) \\) of some parameters, and its adjoint.

    All tensors are flat, shape `(n,)`. They hold one whole parameter, row by row, or a part of several for an elementwise rule.

    Args:
        recipe ([`TargetTrainingArguments`]): Hyperparameters.
        weight_decay (`float`): That of these parameters.
        epsilon_root (`float`): What `adam_epsilon_root` came to.
        shape (`torch.Size`): Shape of the parameter, for a rule that is not elementwise.

    Attributes:
        num_states (`int`): Tensors in \\( s \\). They are zeros before the first step.
        elementwise (`bool`): Whether the rule treats every element alone.
        needs_epsilon_root (`bool`): Whether `adam_epsilon_root` plays a part, here or in what is left to AdamW.
    """

    num_states = 0
    elementwise = True
    needs_epsilon_root = True

    def __init__(self, recipe: "TargetTrainingArguments", weight_decay: float, epsilon_root: float, shape: torch.Size):
        self.recipe = recipe
        self.weight_decay = weight_decay
        self.epsilon_root = epsilon_root
        self.shape = shape

    @classmethod
    def suits(cls, param: nn.Parameter, model: nn.Module) -> bool:
        """Whether the rule can update a parameter of a model. What it cannot is left to AdamW."""
        return True

    @classmethod
    def stock(
        cls, params: list[nn.Parameter], recipe: "TargetTrainingArguments", weight_decay: float
    ) -> torch.optim.Optimizer:
        """The same rule as an ordinary optimizer, which validation trains with."""
        raise ValueError(
            f"The update rule {cls.__name__} has no `stock` optimizer, which validation needs. Define it."
        )

    @abstractmethod
    def update_(self, step: int, rate: float, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        """
        Updates parameters and state in place.

        Args:
            step (`int`): Step, from 0.
            rate (`float`): Learning rate of the step.
            phi (`Tensor`): Parameters.
            state (`tuple[Tensor, ...]`): Their state.
            grad (`Tensor`): Their gradient, which stays as it is.
        """

    @abstractmethod
    def adjoint_(
        self,
        step: int,
        rate: float,
        phi: Tensor,
        state: tuple[Tensor, ...],
        grad: Tensor,
        of_phi: Tensor,
        of_state: tuple[Tensor, ...],
    ) -> Tensor:
        r"""
        Adjoint of [`~Update.update_`]: cotangents of what came out become those of what went in, in place. `of_x` is that of `x`.

        Args:
            step (`int`): Step, from 0.
            rate (`float`): Learning rate of the step.
            phi (`Tensor`): Parameters before the step.
            state (`tuple[Tensor, ...]`): State before the step; empty at step 0. May be overwritten.
            grad (`Tensor`): Gradient that the update was given.
            of_phi (`Tensor`): \\( \lambda_{\phi'} \\); becomes \\( \lambda_\phi \\).
            of_state (`tuple[Tensor, ...]`): \\( \lambda_{s'} \\); become \\( \lambda_s \\), which nothing needs at step 0.
                Empty in a run of one step, where they are zeros.

        Returns:
            `Tensor`: \\( \lambda_g \\), shape `(n,)`.
        """
