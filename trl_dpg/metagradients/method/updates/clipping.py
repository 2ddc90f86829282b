r"""
Clipping by global norm, [`~torch.nn.utils.clip_grad_norm_`], before any update: \\( g' = c\, g \\) with
\\( c = \min(1, M / (\lVert g \rVert + 10^{-6})) \\).
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Clipping:
    r"""Clips the gradients of a run to the norm \\( M \\) = `max_norm`; 0 means no clipping."""

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.norms: list[float] = []  # norm of each step's gradient

    def measure(self, grad: Tensor, norm: Callable[[Tensor], float] = lambda grad: grad.norm().item()) -> None:
        """Records the norm of the next step's gradient."""
        self.norms.append(norm(grad) if self.max_norm > 0 else 0.0)

    def factor(self, step: int) -> float:
        r"""The factor \\( c \\) of a step."""
        return min(1.0, self.max_norm / (self.norms[step] + 1e-6)) if self.max_norm > 0 else 1.0

    def clips(self, step: int) -> bool:
        """Whether a step's gradient was clipped."""
        return self.factor(step) < 1.0

    def clipped(self, step: int, grad: Tensor) -> Tensor:
        """The clipped gradient, which the update takes. `grad` is the whole gradient or a part of it."""
        return grad * self.factor(step) if self.clips(step) else grad

    def adjoint_(self, step: int, cotangent: Tensor, grad: Tensor, inner: float) -> float:
        r"""
        Adjoint on a part of the gradient, in place:

        $$ \lambda_g = c\, \lambda_{g'} - \frac{c\, \langle \lambda_{g'}, g \rangle}{(\lVert g \rVert + 10^{-6}) \lVert g \rVert} g
           \quad \text{where } c < 1 $$

        `cotangent` is this part of \\( \lambda_{g'} \\) and becomes that of \\( \lambda_g \\). `grad` is this part of \\( g \\).
        `inner` is \\( \langle \lambda_{g'}, g \rangle \\), summed over all parts.

        Returns:
            `float`: This part of \\( \langle \lambda_g, g \rangle \\).
        """
        norm, factor = self.norms[step], self.factor(step)
        if self.clips(step):
            radial = factor * inner / ((norm + 1e-6) * norm) if norm > 0 else 0.0
            cotangent.mul_(factor).sub_(grad, alpha=radial)
        return torch.dot(cotangent, grad).item()
