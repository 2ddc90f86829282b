"""The base class of update rules."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from ..recipe import TargetTrainingArguments


@dataclass(eq=False)
class Update(ABC):
    r"""
    Update rule \\( (\phi', s') = U(\phi, s, g) \\) of some parameters, and its adjoint.

    All tensors are flat, shape `(size,)`. For an elementwise rule, they hold any part of the parameters. For any other rule, they hold
    one whole parameter, row by row.

    Attributes:
        recipe ([`TargetTrainingArguments`]): Hyperparameters.
        weight_decay (`float`): Weight decay of these parameters.
        epsilon_root (`float`): Value of `adam_epsilon_root`, as a number even if the recipe says `"auto"`.
        shape (`torch.Size`): Shape of the parameter, for a rule that is not elementwise.
        num_states (`int`): Number of tensors in \\( s \\). They are zeros before the first step.
        elementwise (`bool`): Whether the update of an element depends on that element alone.
        needs_epsilon_root (`bool`): Whether a run with this rule uses `adam_epsilon_root`, if only for parameters left to AdamW.
    """

    num_states = 0
    elementwise = True
    needs_epsilon_root = True

    recipe: "TargetTrainingArguments"
    weight_decay: float
    epsilon_root: float
    shape: torch.Size

    def zero_state(self, phi: Tensor) -> tuple[Tensor, ...]:
        """The state before the first step, and its cotangent after the last."""
        return tuple(torch.zeros_like(phi) for _ in range(self.num_states))

    @classmethod
    def suits(cls, param: nn.Parameter, model: nn.Module) -> bool:
        """Whether the rule can update a parameter of a model. AdamW updates the others."""
        return True

    @classmethod
    def torch_optimizer(
        cls, params: list[nn.Parameter], recipe: "TargetTrainingArguments", weight_decay: float
    ) -> torch.optim.Optimizer:
        """The same rule as an optimizer of PyTorch. Validation trains with it."""
        raise ValueError(
            f"The update rule {cls.__name__} does not define `torch_optimizer`, the PyTorch optimizer that validation trains with. Define it."
        )

    @abstractmethod
    def update_(self, step: int, rate: float, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        """Updates `phi` and `state` in place. Steps count from 0, and `rate` is the learning rate. `grad` must not be changed."""

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
        Adjoint of [`~Update.update_`], with the parameters and the state from before the step. Returns \\( \lambda_g \\).

        `of_phi` is \\( \lambda_{\phi'} \\) and becomes \\( \lambda_\phi \\). `of_state` is \\( \lambda_{s'} \\) and becomes
        \\( \lambda_s \\), whose value at step 0 is not used. An empty tuple, in a run of one step, stands for zeros. `state` is empty
        at step 0, and may be overwritten. `phi` and `grad` must not be changed.
        """
