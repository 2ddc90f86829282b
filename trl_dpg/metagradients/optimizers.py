"""
SGD and AdamW on one parameter tensor: each update beside its adjoint.

An update maps `(param, state, grad)` to the next `(param, state)`. Its adjoint maps the cotangents of the outputs to those
of the inputs. Both are elementwise, so they are written out here rather than left to autograd.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Hyperparameters(NamedTuple):
    """Scalars of one optimizer step; `step` counts from 1 (AdamW's bias correction)."""

    step: int
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    epsilon_root: float


class Moments(NamedTuple):
    """AdamW's first and second moment of one parameter; also the cotangents of the two."""

    first: Tensor
    second: Tensor


def sgd_update_(param: Tensor, grad: Tensor, hp: Hyperparameters) -> None:
    r"""
    Plain SGD with decoupled weight decay, in place: \\( \phi' = (1 - \eta w) \phi - \eta g \\).
    """
    param.mul_(1 - hp.learning_rate * hp.weight_decay).add_(grad, alpha=-hp.learning_rate)


def sgd_adjoint(cotangent: Tensor, hp: Hyperparameters) -> tuple[Tensor, Tensor]:
    r"""
    Adjoint of [`sgd_update_`]: \\( \lambda_g = -\eta \lambda_{\phi'} \\), \\( \lambda_\phi = (1 - \eta w) \lambda_{\phi'} \\).

    Returns:
        `tuple[Tensor, Tensor]`: Cotangents of the gradient and of the parameter.
    """
    return cotangent * -hp.learning_rate, cotangent * (1 - hp.learning_rate * hp.weight_decay)


def adamw_update_(param: Tensor, grad: Tensor, moments: Moments, hp: Hyperparameters) -> None:
    r"""
    AdamW with `epsilon_root`, in place; with `epsilon_root = 0` it is [`~torch.optim.AdamW`].

    $$ m' = \beta_1 m + (1 - \beta_1) g, \quad v' = \beta_2 v + (1 - \beta_2) g^2, \quad
       \phi' = (1 - \eta w) \phi - \eta \frac{m' / (1 - \beta_1^t)}{\sqrt{v' / (1 - \beta_2^t) + r} + \epsilon} $$
    """
    moments.first.lerp_(grad, 1 - hp.beta1)
    moments.second.mul_(hp.beta2).addcmul_(grad, grad, value=1 - hp.beta2)
    param.mul_(1 - hp.learning_rate * hp.weight_decay)
    param.addcdiv_(moments.first, _root(moments.second, hp).add_(hp.epsilon), value=-_step_size(hp))


def adamw_adjoint(
    cotangent: Tensor, moment_cotangents: Moments, grad: Tensor, moments: Moments, hp: Hyperparameters
) -> tuple[Tensor, Tensor, Moments]:
    r"""
    Adjoint of [`adamw_update_`].

    With \\( d = \sqrt{v' / (1 - \beta_2^t) + r} + \epsilon \\) and \\( s = \eta / (1 - \beta_1^t) \\):

    $$ \mu = \lambda_{m'} - \frac{s}{d} \lambda_{\phi'}, \quad
       \nu = \lambda_{v'} + \frac{s\, m'}{2 d^2 (d - \epsilon) (1 - \beta_2^t)} \lambda_{\phi'} $$
    $$ \lambda_g = (1 - \beta_1) \mu + 2 (1 - \beta_2) g\, \nu, \quad \lambda_m = \beta_1 \mu, \quad
       \lambda_v = \beta_2 \nu, \quad \lambda_\phi = (1 - \eta w) \lambda_{\phi'} $$

    Args:
        cotangent (`Tensor`): \\( \lambda_{\phi'} \\).
        moment_cotangents ([`Moments`]): \\( \lambda_{m'}, \lambda_{v'} \\).
        grad (`Tensor`): Gradient that the update was given.
        moments ([`Moments`]): Moments *after* the update, \\( m', v' \\).
        hp ([`Hyperparameters`]): Scalars of the step.

    Returns:
        `tuple[Tensor, Tensor, Moments]`: Cotangents of the gradient, of the parameter and of the moments before the
        update.
    """
    # In place where it can be: a fresh vocabulary-sized tensor costs more than the arithmetic on it.
    root = _root(moments.second, hp)
    denominator = root + hp.epsilon
    scaled = (cotangent / denominator).mul_(_step_size(hp))
    first = moment_cotangents.first - scaled
    through_root = scaled.mul_(moments.first).div_(denominator.mul_(root).mul_(2 * (1 - hp.beta2**hp.step)))
    # Where the root is zero (epsilon_root = 0 and no gradient so far) m' and g are zero too: nothing flows through it.
    second = through_root.masked_fill_(root == 0, 0.0).add_(moment_cotangents.second)
    grad_cotangent = (grad * second).mul_(2 * (1 - hp.beta2)).add_(first, alpha=1 - hp.beta1)
    param_cotangent = cotangent * (1 - hp.learning_rate * hp.weight_decay)
    return grad_cotangent, param_cotangent, Moments(first.mul_(hp.beta1), second.mul_(hp.beta2))


def _root(second_moment: Tensor, hp: Hyperparameters) -> Tensor:
    correction = 1 - hp.beta2**hp.step
    if hp.epsilon_root == 0.0:  # the order of operations of torch.optim.AdamW, so that both round alike
        return second_moment.sqrt().div_(math.sqrt(correction))
    return (second_moment / correction).add_(hp.epsilon_root).sqrt_()


def _step_size(hp: Hyperparameters) -> float:
    return hp.learning_rate / (1 - hp.beta1**hp.step)


def clip_factor(grads: list[Tensor], max_norm: float) -> tuple[float, Tensor]:
    r"""
    Factor \\( c = \min(1, M / (\lVert g \rVert + 10^{-6})) \\) of [`~torch.nn.utils.clip_grad_norm_`], and the norm.

    `max_norm = 0` means no clipping (`c = 1`).
    """
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm == 0.0:
        return 1.0, norm
    return min(1.0, (max_norm / (norm + 1e-6)).item()), norm


def clip_adjoint_(cotangents: list[Tensor], grads: list[Tensor], max_norm: float) -> None:
    r"""
    Adjoint of clipping \\( g' = c(g)\, g \\), in place on \\( \lambda_{g'} \\).

    $$ \lambda_g = c\, \lambda_{g'} - \frac{c\, \langle \lambda_{g'}, g \rangle}{(\lVert g \rVert + 10^{-6}) \lVert g \rVert}
       g \quad \text{where clipping is active } (c < 1). $$
    """
    factor, norm = clip_factor(grads, max_norm)
    if factor == 1.0:
        return
    inner = sum(torch.sum(c * g, dtype=torch.float64) for c, g in zip(cotangents, grads, strict=True))
    radial = (factor * inner / ((norm + 1e-6) * norm)).item() if norm > 0 else 0.0
    for c, g in zip(cotangents, grads, strict=True):
        c.mul_(factor).sub_(g, alpha=radial)


class Optimizer:
    r"""
    The update \\( U \\) of a whole run and its adjoint: clipping, then SGD or AdamW on every parameter.

    Args:
        optim (`str`):
            `"sgd"` or `"adamw"`.
        hyperparameters (`list[list[Hyperparameters]]`):
            Scalars of every step, per parameter.
        max_grad_norm (`float`):
            Global norm that gradients are clipped to; `0.0` means no clipping.
    """

    def __init__(self, optim: str, hyperparameters: list[list[Hyperparameters]], max_grad_norm: float):
        self.optim = optim
        self.hyperparameters = hyperparameters
        self.max_grad_norm = max_grad_norm

    def initial_moments(self, params: Sequence[Tensor]) -> list[Moments]:
        """Zeros for AdamW, also for its cotangents; nothing for SGD."""
        if self.optim == "sgd":
            return []
        return [Moments(torch.zeros_like(p), torch.zeros_like(p)) for p in params]

    def update_(self, step: int, params: Sequence[Tensor], moments: list[Moments], grads: list[Tensor]) -> None:
        """Applies step `step` (from 0) to parameters and moments, in place. Gradients are as before clipping."""
        grads = self._clip(grads)
        for i, (param, grad, hp) in enumerate(zip(params, grads, self.hyperparameters[step], strict=True)):
            if self.optim == "sgd":
                sgd_update_(param, grad, hp)
            else:
                adamw_update_(param, grad, moments[i], hp)

    def adjoint(
        self,
        step: int,
        cotangents: list[Tensor],
        moment_cotangents: list[Moments],
        grads: list[Tensor],
        moments: list[Moments],
    ) -> tuple[list[Tensor], list[Tensor], list[Moments]]:
        """
        Adjoint of [`~Optimizer.update_`].

        Args:
            step (`int`): Step, from 0.
            cotangents (`list[Tensor]`): Of the parameters after the step.
            moment_cotangents (`list[Moments]`): Of the moments after the step.
            grads (`list[Tensor]`): The step's gradients before clipping.
            moments (`list[Moments]`): Moments after the step.

        Returns:
            `tuple`: Cotangents of the gradients (before clipping), of the parameters and of the moments before the step.
        """
        clipped = self._clip(grads)
        grad_cotangents, param_cotangents, new_moment_cotangents = [], [], []
        for i, (cotangent, grad, hp) in enumerate(zip(cotangents, clipped, self.hyperparameters[step], strict=True)):
            if self.optim == "sgd":
                of_grad, of_param = sgd_adjoint(cotangent, hp)
            else:
                of_grad, of_param, of_moments = adamw_adjoint(cotangent, moment_cotangents[i], grad, moments[i], hp)
                new_moment_cotangents.append(of_moments)
            grad_cotangents.append(of_grad)
            param_cotangents.append(of_param)
        clip_adjoint_(grad_cotangents, grads, self.max_grad_norm)
        return grad_cotangents, param_cotangents, new_moment_cotangents

    def _clip(self, grads: list[Tensor]) -> list[Tensor]:
        factor, _ = clip_factor(grads, self.max_grad_norm)
        return grads if factor == 1.0 else [g * factor for g in grads]
