"""What an update rule is, and which rule updates which parameters."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

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
    """

    num_states = 0
    elementwise = True

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
        Adjoint of [`~Update.update_`]: cotangents of what came out become those of what went in, in place.

        Args:
            step (`int`): Step, from 0.
            rate (`float`): Learning rate of the step.
            phi (`Tensor`): Parameters before the step.
            state (`tuple[Tensor, ...]`): State before the step. May be overwritten.
            grad (`Tensor`): Gradient that the update was given.
            of_phi (`Tensor`): \\( \lambda_{\phi'} \\); becomes \\( \lambda_\phi \\).
            of_state (`tuple[Tensor, ...]`): \\( \lambda_{s'} \\); become \\( \lambda_s \\), which nothing needs at step 0.

        Returns:
            `Tensor`: \\( \lambda_g \\), shape `(n,)`. Its memory may be that of `state`.
        """


class Group(NamedTuple):
    """Parameters that one rule updates, with or without weight decay: a single one if the rule is not elementwise."""

    rule: type[Update]
    decayed: bool
    params: list[nn.Parameter]


def parameter_groups(
    rule: type[Update], model: nn.Module, params: list[nn.Parameter], decayed: list[nn.Parameter], rest: type[Update]
) -> list[Group]:
    """
    Shares parameters out among rules.

    Args:
        rule (`type[Update]`): Updates what suits it.
        model (`nn.Module`): The model.
        params (`list[nn.Parameter]`): Its distinct trained parameters.
        decayed (`list[nn.Parameter]`): What weight decay applies to.
        rest (`type[Update]`): Elementwise rule for all others.
    """
    ids = {id(param) for param in decayed}
    suited = [param for param in params if rule.suits(param, model)]
    groups = [] if rule.elementwise else [Group(rule, id(param) in ids, [param]) for param in suited]
    taken = {id(param) for group in groups for param in group.params}
    for is_decayed in (True, False):
        others = [p for p in params if id(p) not in taken and (id(p) in ids) == is_decayed]
        if others:
            groups.append(Group(rule if rule.elementwise else rest, is_decayed, others))
    return groups
