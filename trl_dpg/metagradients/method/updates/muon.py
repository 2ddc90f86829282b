r"""
Muon, [`~torch.optim.Muon`] with `adjust_lr_fn="match_rms_adamw"`, in the precision of the parameters instead of bfloat16.

For a \\( p \times q \\) matrix, momentum \\( \mu \\), and the orthogonalization \\( N \\) by five Newton-Schulz iterations:

$$ b' = \mu b + (1 - \mu) g, \quad u = (1 - \mu) g + \mu b' \text{ with Nesterov's momentum, else } b', \quad
   \phi' = (1 - \eta w) \phi - 0.2 \sqrt{\max(p, q)}\, \eta N(u) $$

The factor makes a step about as long as one of AdamW, so both can use the same learning rate.
"""

import math

import torch
from torch import Tensor, nn

from .update import Update


A, B, C = 3.4445, -4.7750, 2.0315
NUM_ITERATIONS = 5
EPSILON = 1e-7


class Muon(Update):
    """The rule of this module's docstring, for matrices in hidden layers and adapters. Embeddings and the LM head are left to AdamW."""

    num_states = 1
    elementwise = False

    def __init__(self, *args):
        super().__init__(*args)
        self.momentum, self.nesterov = _momentum(self.recipe)
        self.rate_factor = 0.2 * math.sqrt(max(self.shape))

    @classmethod
    def suits(cls, param: nn.Parameter, model: nn.Module) -> bool:
        """Whether a parameter is a matrix that belongs neither to an embedding nor to the LM head."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        outer = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
        return param.ndim == 2 and not any(param is other for module in outer for other in module.parameters())

    @classmethod
    def torch_optimizer(cls, params, recipe, weight_decay) -> torch.optim.Optimizer:
        momentum, nesterov = _momentum(recipe)
        rate, adjust = recipe.learning_rate, "match_rms_adamw"
        return torch.optim.Muon(params, rate, weight_decay, momentum, nesterov, adjust_lr_fn=adjust)

    def update_(self, step: int, rate: float, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        orthogonal = orthogonalized(self._momentum_step_(grad, *state).view(self.shape))
        phi.mul_(1 - rate * self.weight_decay).add_(orthogonal.reshape(-1), alpha=-rate * self.rate_factor)

    def adjoint_(self, step, rate, phi, state, grad, of_phi, of_state) -> Tensor:
        r"""
        See [`Update.adjoint_`]. With \\( \lambda_u = -0.2 \sqrt{\max(p, q)}\, \eta\, (\partial N / \partial u)^\top \lambda_{\phi'} \\)
        from autograd:

        $$ \nu = \lambda_{b'} + \mu \lambda_u, \quad \lambda_g = (1 - \mu) (\lambda_u + \nu) \text{ with Nesterov's momentum, else }
           \nu = \lambda_{b'} + \lambda_u, \quad \lambda_g = (1 - \mu) \nu; \quad \lambda_b = \mu \nu $$
        """
        u = self._momentum_step_(grad, *(state or self.zero_state(grad))).detach().view(self.shape)
        with torch.enable_grad():
            orthogonal = orthogonalized(u.requires_grad_())
        (of_u,) = torch.autograd.grad(orthogonal, u, of_phi.view(self.shape) * (-rate * self.rate_factor))
        of_u = of_u.reshape(-1)
        (of_buffer,) = of_state or self.zero_state(grad)
        of_buffer.add_(of_u, alpha=self.momentum if self.nesterov else 1.0)
        of_grad = (of_u + of_buffer if self.nesterov else of_buffer.clone()).mul_(1 - self.momentum)
        of_buffer.mul_(self.momentum)
        of_phi.mul_(1 - rate * self.weight_decay)
        return of_grad

    def _momentum_step_(self, grad: Tensor, buffer: Tensor) -> Tensor:
        buffer.lerp_(grad, 1 - self.momentum)
        return grad.lerp(buffer, self.momentum) if self.nesterov else buffer


def _momentum(recipe) -> tuple[float, bool]:
    return 0.95 if recipe.momentum is None else recipe.momentum, recipe.nesterov is not False


def orthogonalized(matrix: Tensor) -> Tensor:
    r"""
    Roughly \\( U V^\top \\) of a matrix \\( M = U S V^\top \\). The result has singular values between 0.7 and 1.2 in place of \\( S \\).

    Starts from \\( X = M / \lVert M \rVert_F \\) and iterates \\( X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X \\) five times.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=EPSILON)
    for _ in range(NUM_ITERATIONS):
        gram = wide @ wide.T
        wide = A * wide + (B * gram + C * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
