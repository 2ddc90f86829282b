r"""
AdamW with `epsilon_root` \\( r \\). With \\( r = 0 \\), this is [`~torch.optim.AdamW`] with `fused=True`.

$$ m' = \beta_1 m + (1 - \beta_1) g, \quad v' = \beta_2 v + (1 - \beta_2) (g^2 + r), \quad
   \phi' = (1 - \eta w) \phi - \eta \frac{m' / (1 - \beta_1^t)}{\sqrt{v' / (1 - \beta_2^t)} + \epsilon} $$

Every step adds \\( r \\) to the second moment, so \\( v' / (1 - \beta_2^t) \\) equals that of [`~torch.optim.AdamW`] plus \\( r \\).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .update import Update


class AdamW(Update):
    """The rule of this module's docstring."""

    num_states = 2

    def __init__(self, *args):
        super().__init__(*args)
        self.beta1 = self.recipe.adam_beta1
        self.beta2 = max(self.recipe.adam_beta2, 1e-20)  # `update_` divides by it
        self.epsilon = self.recipe.adam_epsilon
        self.constants: dict[str, Any] = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.epsilon}
        self.constants |= {"weight_decay": self.weight_decay, "amsgrad": False, "maximize": False, "fused": True}

    @classmethod
    def torch_optimizer(cls, params, recipe, weight_decay) -> torch.optim.Optimizer:
        """See [`Update.torch_optimizer`]. PyTorch's optimizer has no `epsilon_root`."""
        betas = recipe.adam_beta1, recipe.adam_beta2
        return torch.optim.AdamW(params, recipe.learning_rate, betas, recipe.adam_epsilon, weight_decay)

    def update_(self, step: int, rate: float, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        if self.epsilon_root > 0:  # the kernel has no r
            if self.recipe.adam_beta2 == 0:
                state[1].zero_()
            state[1].add_((1 - self.beta2) / self.beta2 * self.epsilon_root)  # the kernel will multiply v by beta2
        count = torch.full((), float(step), dtype=torch.float32, device=phi.device)  # the kernel adds 1; float32 only
        adamw([phi], [grad], [state[0]], [state[1]], [], [count], lr=rate, **self.constants)

    def adjoint_(self, step, rate, phi, state, grad, of_phi, of_state) -> Tensor:
        r"""
        See [`Update.adjoint_`]. With \\( \rho = \sqrt{v' / (1 - \beta_2^t)} \\), \\( d = \rho + \epsilon \\) and
        \\( s = \eta / (1 - \beta_1^t) \\):

        $$ \mu = \lambda_{m'} - \frac{s}{d} \lambda_{\phi'}, \quad
           \nu = \lambda_{v'} + \frac{s\, m'}{2 d^2 \rho\, (1 - \beta_2^t)} \lambda_{\phi'} $$
        $$ \lambda_g = (1 - \beta_1) \mu + 2 (1 - \beta_2) g\, \nu, \quad \lambda_m = \beta_1 \mu, \quad
           \lambda_v = \beta_2 \nu, \quad \lambda_\phi = (1 - \eta w) \lambda_{\phi'} $$
        """
        if step == 0:
            return self._first_adjoint_(rate, grad, of_phi, of_state)
        (first, second), (mu, nu) = state, of_state
        correction, step_size = 1 - self.beta2 ** (step + 1), rate / (1 - self.beta1 ** (step + 1))
        first.lerp_(grad, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        if self.epsilon_root > 0:
            second.add_((1 - self.beta2) * self.epsilon_root)
        # `root` and `denominator` lack the factor 1 / sqrt(correction) of the formula. Scalars make up for it.
        root = second.sqrt()
        denominator = root + self.epsilon * math.sqrt(correction)
        step_size *= math.sqrt(correction)
        ratio = of_phi / denominator
        mu.add_(ratio, alpha=-step_size)
        denominator.mul_(root)
        if self.epsilon_root == 0:
            # Where the root is zero (no gradient so far), m' and g are zero too, so this term is zero.
            denominator.masked_fill_(root == 0, 1.0)
        nu.addcdiv_(ratio.mul_(first), denominator, value=step_size / 2)

        of_grad = torch.mul(mu, 1 - self.beta1, out=ratio).addcmul_(grad, nu, value=2 * (1 - self.beta2))
        mu.mul_(self.beta1)
        nu.mul_(self.beta2)
        if self.weight_decay > 0:
            of_phi.mul_(1 - rate * self.weight_decay)
        return of_grad

    def _first_adjoint_(self, rate: float, grad: Tensor, of_phi: Tensor, of_state: tuple[Tensor, ...]) -> Tensor:
        r"""
        The adjoint at the first step, where \\( m = v = 0 \\) and so \\( \phi' = (1 - \eta w) \phi - \eta g / d \\) with
        \\( \rho = \sqrt{g^2 + r} \\), \\( d = \rho + \epsilon \\):

        $$ \lambda_g = (1 - \beta_1) \lambda_{m'} + 2 (1 - \beta_2) g\, \lambda_{v'}
           - \eta\, \frac{r / \rho + \epsilon}{d^2} \lambda_{\phi'} $$

        This form takes less than half the operations. Where \\( g^2 \gg r \\), the general form subtracts nearly equal terms.
        """
        root = (grad * grad).add_(self.epsilon_root).sqrt_()
        of_grad = root + self.epsilon
        torch.div(of_phi, of_grad.mul_(of_grad), out=of_grad)
        if self.epsilon_root == 0:  # r / rho is 0, also where the gradient and thus rho are zero
            of_grad.mul_(-rate * self.epsilon)
        else:
            of_grad.mul_(root.reciprocal_().mul_(-rate * self.epsilon_root).sub_(rate * self.epsilon))
        if of_state:
            of_grad.add_(of_state[0], alpha=1 - self.beta1).addcmul_(grad, of_state[1], value=2 * (1 - self.beta2))
        if self.weight_decay > 0:
            of_phi.mul_(1 - rate * self.weight_decay)
        return of_grad
