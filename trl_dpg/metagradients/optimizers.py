"""
SGD and AdamW on one tensor: each update beside its adjoint.

An update maps `(param, state, grad)` to the next `(param, state)`. Its adjoint maps the cotangents of the outputs to those
of the inputs. Both are elementwise, so adjoints are written out here rather than left to autograd.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw


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
    """AdamW's first and second moment of one parameter, the latter with `epsilon_root` in it; also the cotangents of the two."""

    first: Tensor
    second: Tensor


def sgd_update_(param: Tensor, grad: Tensor, hp: Hyperparameters) -> None:
    r"""
    Plain SGD with decoupled weight decay, in place: \\( \phi' = (1 - \eta w) \phi - \eta g \\).
    """
    param.mul_(1 - hp.learning_rate * hp.weight_decay).add_(grad, alpha=-hp.learning_rate)


def sgd_adjoint_(cotangent: Tensor, hp: Hyperparameters) -> Tensor:
    r"""
    Adjoint of [`sgd_update_`]: \\( \lambda_g = -\eta \lambda_{\phi'} \\), \\( \lambda_\phi = (1 - \eta w) \lambda_{\phi'} \\).

    `cotangent` becomes that of the parameter; that of the gradient is returned.
    """
    of_grad = cotangent * -hp.learning_rate
    cotangent.mul_(1 - hp.learning_rate * hp.weight_decay)
    return of_grad


def adamw_update_(param: Tensor, grad: Tensor, moments: Moments, hp: Hyperparameters) -> None:
    r"""
    AdamW with `epsilon_root`, in place; with `epsilon_root = 0` it is [`~torch.optim.AdamW`] with `fused=True`.

    $$ m' = \beta_1 m + (1 - \beta_1) g, \quad v' = \beta_2 v + (1 - \beta_2) (g^2 + r), \quad
       \phi' = (1 - \eta w) \phi - \eta \frac{m' / (1 - \beta_1^t)}{\sqrt{v' / (1 - \beta_2^t)} + \epsilon} $$

    With \\( r \\) in the second moment from the start, \\( v' / (1 - \beta_2^t) \\) is that of [`~torch.optim.AdamW`] plus \\( r \\).
    """
    beta2 = hp.beta2
    if hp.epsilon_root > 0.0:  # the kernel only knows \\( \beta_2 v + (1 - \beta_2) g^2 \\)
        if beta2 < 1e-20:  # of v nothing stays
            beta2 = 1e-20
            moments.second.zero_()
        moments.second.add_((1 - beta2) / beta2 * hp.epsilon_root)
    adamw(
        [param],
        [grad],
        [moments.first],
        [moments.second],
        [],
        [torch.full((), float(hp.step - 1), dtype=torch.float32, device=param.device)],  # whatever the default dtype
        lr=hp.learning_rate,
        beta1=hp.beta1,
        beta2=beta2,
        eps=hp.epsilon,
        weight_decay=hp.weight_decay,
        amsgrad=False,
        maximize=False,
        fused=True,
    )


def adamw_adjoint_(
    cotangent: Tensor,
    moment_cotangents: Moments,
    grad: Tensor,
    moments: Moments,
    hp: Hyperparameters,
    out: Tensor,
    scratch: Sequence[Tensor],
) -> Tensor:
    r"""
    Adjoint of [`adamw_update_`], in place: cotangents of what came out of the update become those of what went in.

    With \\( \rho = \sqrt{v' / (1 - \beta_2^t)} \\), \\( d = \rho + \epsilon \\) and \\( s = \eta / (1 - \beta_1^t) \\):

    $$ \mu = \lambda_{m'} - \frac{s}{d} \lambda_{\phi'}, \quad
       \nu = \lambda_{v'} + \frac{s\, m'}{2 d^2 \rho\, (1 - \beta_2^t)} \lambda_{\phi'} $$
    $$ \lambda_g = (1 - \beta_1) \mu + 2 (1 - \beta_2) g\, \nu, \quad \lambda_m = \beta_1 \mu, \quad
       \lambda_v = \beta_2 \nu, \quad \lambda_\phi = (1 - \eta w) \lambda_{\phi'} $$

    Args:
        cotangent (`Tensor`): \\( \lambda_{\phi'} \\); becomes \\( \lambda_\phi \\).
        moment_cotangents ([`Moments`]): \\( \lambda_{m'}, \lambda_{v'} \\); become \\( \lambda_m, \lambda_v \\).
        grad (`Tensor`): Gradient that the update was given.
        moments ([`Moments`]): Moments *before* the update; become those after it.
        hp ([`Hyperparameters`]): Scalars of the step.
        out (`Tensor`): For the result. May be the second moment, which is then no longer that after the update.
        scratch (`Sequence[Tensor]`): Two tensors of the same size: fresh ones would cost more than the arithmetic.

    Returns:
        `Tensor`: \\( \lambda_g \\), which is `out`.
    """
    root, denominator = scratch
    correction, size = 1 - hp.beta2**hp.step, hp.learning_rate / (1 - hp.beta1**hp.step)
    moments.first.lerp_(grad, 1 - hp.beta1)
    moments.second.mul_(hp.beta2).addcmul_(grad, grad, value=1 - hp.beta2)
    if hp.epsilon_root > 0.0:
        moments.second.add_((1 - hp.beta2) * hp.epsilon_root)
    # The root of `correction` is taken out of root and denominator, into scalars.
    torch.sqrt(moments.second, out=root)
    torch.add(root, hp.epsilon * math.sqrt(correction), out=denominator)

    size *= math.sqrt(correction)
    ratio = torch.div(cotangent, denominator, out=out)
    mu = moment_cotangents.first.add_(ratio, alpha=-size)
    denominator.mul_(root)
    if hp.epsilon_root == 0.0:
        # Where the root is zero (no gradient so far) m' and g are zero too: nothing flows through it.
        denominator.masked_fill_(root == 0, 1.0)
    nu = moment_cotangents.second.addcdiv_(ratio.mul_(moments.first), denominator, value=size / 2)

    torch.mul(mu, 1 - hp.beta1, out=out).addcmul_(grad, nu, value=2 * (1 - hp.beta2))
    mu.mul_(hp.beta1)
    nu.mul_(hp.beta2)
    if hp.weight_decay:
        cotangent.mul_(1 - hp.learning_rate * hp.weight_decay)
    return out


def adamw_first_adjoint_(
    cotangent: Tensor,
    moment_cotangents: Moments | None,
    grad: Tensor,
    hp: Hyperparameters,
    out: Tensor,
    scratch: Tensor,
) -> Tensor:
    r"""
    Adjoint of [`adamw_update_`] at the first step of a run, in place on \\( \lambda_{\phi'} \\) alone.

    Moments are zeros before it, so that \\( \phi' = (1 - \eta w) \phi - \eta g / d \\) with \\( \rho = \sqrt{g^2 + r} \\) and
    \\( d = \rho + \epsilon \\). In less than half the operations, and without the difference of nearly equal terms that
    [`adamw_adjoint_`] has where \\( g^2 \gg r \\):

    $$ \lambda_g = (1 - \beta_1) \lambda_{m'} + 2 (1 - \beta_2) g\, \lambda_{v'}
       - \eta\, \frac{r / \rho + \epsilon}{d^2} \lambda_{\phi'}, \quad \lambda_\phi = (1 - \eta w) \lambda_{\phi'} $$

    Args:
        cotangent (`Tensor`): \\( \lambda_{\phi'} \\); becomes \\( \lambda_\phi \\).
        moment_cotangents ([`Moments`]): \\( \lambda_{m'}, \lambda_{v'} \\); `None` are zeros.
        grad (`Tensor`): Gradient that the update was given.
        hp ([`Hyperparameters`]): Scalars of the step.
        out (`Tensor`): For the result.
        scratch (`Tensor`): Another of the same size.

    Returns:
        `Tensor`: \\( \lambda_g \\), which is `out`.
    """
    root = torch.mul(grad, grad, out=scratch).add_(hp.epsilon_root).sqrt_()
    torch.add(root, hp.epsilon, out=out)
    torch.div(cotangent, out.mul_(out), out=out)
    if hp.epsilon_root == 0.0:  # also where the gradient is zero, and so is the root: nothing flows through it
        out.mul_(-hp.learning_rate * hp.epsilon)
    else:
        out.mul_(root.reciprocal_().mul_(-hp.learning_rate * hp.epsilon_root).sub_(hp.learning_rate * hp.epsilon))
    if moment_cotangents is not None:
        out.add_(moment_cotangents.first, alpha=1 - hp.beta1)
        out.addcmul_(grad, moment_cotangents.second, value=2 * (1 - hp.beta2))
    if hp.weight_decay:
        cotangent.mul_(1 - hp.learning_rate * hp.weight_decay)
    return out


def clip_factor(norm: float, max_norm: float) -> float:
    r"""
    Factor \\( c = \min(1, M / (\lVert g \rVert + 10^{-6})) \\) of [`~torch.nn.utils.clip_grad_norm_`].

    `max_norm = 0` means no clipping (`c = 1`).
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def clip_adjoint_(cotangent: Tensor, grad: Tensor, inner: float, norm: float, max_norm: float) -> None:
    r"""
    Adjoint of clipping \\( g' = c(g)\, g \\), in place on \\( \lambda_{g'} \\).

    $$ \lambda_g = c\, \lambda_{g'} - \frac{c\, \langle \lambda_{g'}, g \rangle}{(\lVert g \rVert + 10^{-6}) \lVert g \rVert}
       g \quad \text{where clipping is active } (c < 1). $$

    `inner` and `norm` are \\( \langle \lambda_{g'}, g \rangle \\) and \\( \lVert g \rVert \\) over all processes.
    """
    factor = clip_factor(norm, max_norm)
    if factor < 1.0:
        radial = factor * inner / ((norm + 1e-6) * norm) if norm > 0 else 0.0
        cotangent.mul_(factor).sub_(grad, alpha=radial)


class Optimizer:
    r"""
    The update \\( U \\) of a whole run and its adjoint, on flat tensors: clipping, then SGD or AdamW.

    Elementwise work goes through the tensors in blocks: fresh tensors of the size of a model cost more than the arithmetic on
    them. On smaller ones, threads of a processor would mostly wait for each other.

    Args:
        optim (`str`):
            `"sgd"` or `"adamw"`.
        hyperparameters (`list[Hyperparameters]`):
            Scalars of every step.
        num_decayed (`int`):
            Weight decay applies to this many elements from the start.
        max_grad_norm (`float`):
            Global norm that gradients are clipped to; `0.0` means no clipping.
    """

    BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements; pinned memory is rounded up to a power of two

    def __init__(self, optim: str, hyperparameters: list[Hyperparameters], num_decayed: int, max_grad_norm: float):
        self.optim = optim
        self.hyperparameters = hyperparameters
        self.num_decayed = num_decayed
        self.max_grad_norm = max_grad_norm
        self.norms: list[float] = []  # of the gradients before clipping

    def shard(self, start: int, stop: int) -> "Optimizer":
        """The same run on the elements from `start` to `stop` alone; gradient norms stay those of all elements."""
        part = Optimizer(
            self.optim,
            self.hyperparameters,
            min(max(self.num_decayed - start, 0), stop - start),
            self.max_grad_norm,
        )
        part.norms = self.norms
        return part

    def blocks(self, values: Tensor) -> Iterator[tuple[slice, "Optimizer"]]:
        """Consecutive parts of flat tensors, and the same run on each."""
        size = self.BLOCK.get(values.device.type, len(values))
        for start in range(0, len(values), size):
            stop = min(start + size, len(values))
            yield slice(start, stop), self.shard(start, stop)

    def measure(self, grad: Tensor) -> None:
        """Notes the next step's gradient norm, if clipping needs it."""
        self.norms.append(grad.norm().item() if self.max_grad_norm > 0 else 0.0)

    def initial_moments(self, values: Tensor) -> Moments | None:
        """Zeros for AdamW, also for its cotangents; `None` for SGD."""
        return None if self.optim == "sgd" else Moments(torch.zeros_like(values), torch.zeros_like(values))

    @torch.no_grad()
    def update_(self, step: int, values: Tensor, moments: Moments | None, grad: Tensor) -> None:
        """
        Applies step `step` (from 0) to parameters and moments, in place. The gradient is as before clipping.

        `moments=None` are zeros, and are not wanted afterwards.
        """
        factor = clip_factor(self.norms[step], self.max_grad_norm)
        for hp, part, piece, *of_piece in self._pieces(step, values, grad, *(moments or ())):
            if factor < 1.0:
                piece = piece * factor
            if self.optim == "sgd":
                sgd_update_(part, piece, hp)
            else:
                zeros = () if of_piece else (torch.zeros_like(piece), torch.zeros_like(piece))
                adamw_update_(part, piece, Moments(*of_piece, *zeros), hp)

    @torch.no_grad()
    def adjoint_(
        self,
        step: int,
        cotangent: Tensor,
        moment_cotangents: Moments | None,
        grad: Tensor,
        moments: Moments | None,
        out: Tensor,
    ) -> Tensor:
        r"""
        Adjoint of [`~Optimizer.update_`], in place, up to clipping, which needs a sum over all elements first.

        Args:
            step (`int`): Step, from 0.
            cotangent (`Tensor`): Of the parameters after the step; becomes that before it.
            moment_cotangents ([`Moments`]): Of the moments after the step; become those before it, but at the first step.
                `None` for SGD, and for zeros at the first step.
            grad (`Tensor`): The step's gradient before clipping.
            moments ([`Moments`]): Moments before the step; overwritten. `None` for SGD, and for AdamW at the first step.
            out (`Tensor`): For the cotangent \\( \lambda_g \\) of the gradient after clipping. May be the second moment or,
                at the first step, `cotangent`.

        Returns:
            `Tensor`: \\( \langle \lambda_g, g \rangle \\), float64 of shape `()`.
        """
        factor = clip_factor(self.norms[step], self.max_grad_norm)
        inner = torch.zeros((), dtype=torch.float64, device=grad.device)
        tensors = cotangent, grad, out, *(moment_cotangents or ()), *(moments or ())
        for hp, part, piece, target, *of_piece in self._pieces(step, *tensors):
            clipped = piece if factor == 1.0 else piece * factor
            buffers = [torch.empty_like(piece) for _ in range(2 if self.optim == "adamw" else 0)]
            if self.optim == "sgd":
                result = sgd_adjoint_(part, hp)
            elif moments is None:
                result = adamw_first_adjoint_(part, Moments(*of_piece) if of_piece else None, clipped, hp, *buffers)
            else:
                before, after = Moments(*of_piece[2:]), Moments(*of_piece[:2])
                result = adamw_adjoint_(part, after, clipped, before, hp, target, buffers)
            inner += torch.dot(result, piece)
            if result is not target:
                target.copy_(result)
        return inner

    def clips(self, step: int) -> bool:
        """Whether the step's gradient was clipped."""
        return clip_factor(self.norms[step], self.max_grad_norm) < 1.0

    @torch.no_grad()
    def clip_adjoint_(self, step: int, cotangent: Tensor, grad: Tensor, inner: float) -> Tensor:
        r"""
        Adjoint of a step's clipping, in place on what [`~Optimizer.adjoint_`] gave.

        Args:
            step (`int`): Step, from 0.
            cotangent (`Tensor`): \\( \lambda_g \\) after clipping; becomes that before it.
            grad (`Tensor`): The step's gradient before clipping.
            inner (`float`): What [`~Optimizer.adjoint_`] returned, summed over all elements.

        Returns:
            `Tensor`: \\( \langle \lambda_g, g \rangle \\) with the new one, float64 of shape `()`.
        """
        clip_adjoint_(cotangent, grad, inner, self.norms[step], self.max_grad_norm)
        return torch.dot(cotangent, grad).double()

    def _pieces(self, step: int, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Scalars of a step, and pieces of tensors that they apply to."""
        hp = self.hyperparameters[step]
        for part, block in self.blocks(tensors[0]):
            decayed = part.start + block.num_decayed
            if part.start < decayed:
                yield hp, *(t[part.start : decayed] for t in tensors)
            if decayed < part.stop:
                yield hp._replace(weight_decay=0.0), *(t[decayed : part.stop] for t in tensors)
