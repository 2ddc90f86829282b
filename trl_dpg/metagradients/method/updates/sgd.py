r"""
Stochastic gradient descent, [`~torch.optim.SGD`], with weight decay \\( w \\), momentum \\( \mu \\) and rate \\( \eta \\):

$$ \tilde g = g + w \phi, \quad b' = \mu b + \tilde g, \quad \phi' = \phi - \eta u, \quad
   u = \tilde g + \mu b' \text{ with Nesterov's momentum, else } b' $$
"""

import torch
from torch import Tensor

from .update import Update


class SGD(Update):
    """The rule of this module's docstring."""

    needs_epsilon_root = False

    def __init__(self, *args):
        super().__init__(*args)
        self.momentum = self.recipe.momentum or 0.0
        self.num_states = 1 if self.momentum > 0 else 0

    @classmethod
    def torch_optimizer(cls, params, recipe, weight_decay) -> torch.optim.Optimizer:
        momentum, nesterov = recipe.momentum or 0.0, bool(recipe.nesterov)
        return torch.optim.SGD(params, recipe.learning_rate, momentum, weight_decay=weight_decay, nesterov=nesterov)

    def update_(self, step: int, rate: float, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        if self.weight_decay > 0:
            grad = grad.add(phi, alpha=self.weight_decay)
        if self.momentum > 0:
            (buffer,) = state
            buffer.mul_(self.momentum).add_(grad)
            grad = grad.add(buffer, alpha=self.momentum) if self.recipe.nesterov else buffer
        phi.add_(grad, alpha=-rate)

    def adjoint_(self, step, rate, phi, state, grad, of_phi, of_state) -> Tensor:
        r"""
        See [`Update.adjoint_`]. With \\( \lambda_u = -\eta \lambda_{\phi'} \\):

        $$ \lambda_{b} = \mu (\lambda_{b'} + \mu \lambda_u), \quad \lambda_g = \lambda_u + \lambda_{b'} + \mu \lambda_u
           \text{ with Nesterov's momentum, else } \lambda_b = \mu (\lambda_{b'} + \lambda_u),
           \quad \lambda_g = \lambda_{b'} + \lambda_u; \quad \lambda_\phi = \lambda_{\phi'} + w \lambda_g $$
        """
        of_grad = of_phi * -rate
        if self.momentum > 0:
            (of_buffer,) = of_state or self.zero_state(grad)
            of_buffer.add_(of_grad, alpha=self.momentum if self.recipe.nesterov else 1.0)
            of_grad = of_grad.add_(of_buffer) if self.recipe.nesterov else of_buffer.clone()
            of_buffer.mul_(self.momentum)
        if self.weight_decay > 0:
            of_phi.add_(of_grad, alpha=self.weight_decay)
        return of_grad
