"""
Derivatives of one batch's loss: its gradient, and, by double backward or by central differences, the Hessian-vector product
\\( H_t \\lambda_g \\) and every token's \\( \\langle \\nabla_\\phi \\ell_{ij}(\\phi_t), \\lambda_g \\rangle / Z_t \\), also of the candidates that could
stand in its place.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from .dora import DetachedOnce, dora_under
from .flat import TAIL, FlatParameters
from .losses import MicroBatch, TokenLosses
from .memory import OutOfMemory
from .processes import Processes
from .second_order import cheaper_second_order, twice_differentiable


FIRST_DISTANCE = 1e-4  # relative to the parameters; where central differences begin to look for their step size
FIRST_CHANGE = 0.1  # nats per token over the cube root of the precision; the change of loss that they look for
PROBED = 8  # examples, to find it; an eighth of a batch if that is less, but at least two


def gradient(
    losses: TokenLosses,
    flat: FlatParameters,
    batches: list[MicroBatch],
    example_losses: Tensor,
    prepare: Callable[[], None],
) -> float:
    r"""
    Accumulates the gradient \\( g_t = \nabla_\phi L_t(\phi_t; w) \\) of this process's micro-batches, and returns their loss.

    The \\( \ell_i(\phi_t) / Z_t \\) are written into `example_losses`, shape `(n,)`. `prepare` is called before the first backward
    pass: until then, memory for gradients may hold other things.
    """
    total = 0.0
    if not batches:
        prepare()
    for i, batch in enumerate(batches):
        values = losses(batch)
        if i == 0:
            prepare()
        values.backward(batch.token_weights(), inputs=flat.params)
        examples = batch.example_sums(values.detach()[:, 0])
        example_losses[batch.indices] = examples
        total += torch.dot(examples, batch.weights.double()).item()
    return total


class Derivatives(ABC):
    """
    What differentiates a batch's loss a second time.

    Attributes:
        errors (`list[float]`): Estimated relative error of each step, the last step first; empty where there is none.
        num_fallbacks (`int`): Steps that were repeated exactly.
    """

    def __init__(self):
        self.errors: list[float] = []
        self.num_fallbacks = 0

    @abstractmethod
    def __call__(
        self,
        batches: list[MicroBatch],
        vector: Tensor,
        inner: float,
        example_losses: Tensor,
        token_metagradients: Tensor,
        buffer: Tensor | None,
    ) -> Tensor | None:
        r"""
        Derivatives of one batch along \\( \lambda_g \\), at the parameters' values.

        Args:
            batches (`list[MicroBatch]`): This process's part of the batch.
            vector (`Tensor`): \\( \lambda_g \\), shape `(size,)`.
            inner (`float`): This process's part of \\( \langle \lambda_g, g_t \rangle \\), to compare with.
            example_losses (`Tensor`): \\( \ell_i(\phi_t) / Z_t \\) of the forward sweep, shape `(n,)`, to compare with.
            token_metagradients (`Tensor`):
                The derivatives of all examples' tokens, one after the other, and of their candidates are added to it, shape
                `(tokens, 1 + k)`.
            buffer (`Tensor`):
                Memory for the product, shape `(size + TAIL,)`, or `(size,)` for a single process. `None`: the product is
                not wanted.

        Returns:
            `Tensor`: \\( H_t \lambda_g \\) over all processes, shape `(size,)`, in the memory of `buffer`; `None` without it.
        """


class Exact(Derivatives):
    r"""
    Double backward on the real module: any twice differentiable model, to rounding error.

    Costs 8 to 9 forward passes (plain training: 3) and about three times the memory of a training step's activations. At the
    first step, where no product is needed, forward-mode differentiation costs 3 and no graph.

    Args:
        losses ([`TokenLosses`]): Losses of the model.
        flat ([`FlatParameters`]): Its trained parameters.
        processes ([`Processes`]): Who shares the work.
    """

    def __init__(self, losses: TokenLosses, flat: FlatParameters, processes: Processes):
        super().__init__()
        self.losses = losses
        self.flat = flat
        self.processes = processes

    def __call__(
        self,
        batches: list[MicroBatch],
        vector: Tensor,
        inner: float,
        example_losses: Tensor,
        token_metagradients: Tensor,
        buffer: Tensor | None,
    ) -> Tensor | None:
        """As of [`Derivatives`]."""
        parts = torch.zeros_like(token_metagradients)
        sums = [inner, 0.0, 0.0]
        with _summing(self.flat, self.processes, buffer, sums), twice_differentiable(self.losses.model):
            if buffer is not None:
                self._product(batches, vector, parts)
            else:
                self._token_derivatives(batches, vector, parts)
            for batch in batches:
                weighted = batch.example_sums(parts[batch.places(), 0]) * batch.weights
                sums[1] += weighted.sum().item()
                sums[2] += weighted.abs().sum().item()
        expected, found, size = sums
        if abs(found - expected) > 0.1 * size and not self.losses.bf16:
            warnings.warn(
                f"The examples' derivatives sum to {found:.3g}, but the training gradient says {expected:.3g}. Either they are "
                "nothing but rounding error (raise `learning_rate` or `adam_epsilon_root`), or the model's gradient is not "
                "the derivative of its loss, and its metagradients are wrong. `check_metagradients` tells which.",
                stacklevel=3,
            )
        token_metagradients += parts
        return None if buffer is None else buffer[: self.flat.size]

    def _product(self, batches, vector, parts) -> None:
        vectors = self.flat.views(vector)
        for batch in batches:
            # The weights are a leaf of the same graph, so the pass also gives the derivatives of tokens and candidates.
            weights = batch.token_weights(candidates=True).requires_grad_()
            detached = DetachedOnce()
            with dora_under(self.losses.model, detached):
                with cheaper_second_order(self.losses.model, self.losses.bf16):
                    loss = torch.sum(self.losses(batch, candidates=True) * weights)
                grads = torch.autograd.grad(loss, self.flat.params, create_graph=True, allow_unused=True)
                # <g, vector> is differentiated without being computed.
                reached = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
                if reached:
                    outputs, directions = zip(*reached, strict=True)
                    detached.backward(outputs, directions, [*self.flat.params, weights])
                    del outputs
            del loss, grads, reached, detached  # their graph
            if weights.grad is not None:
                parts[batch.places()] += weights.grad

    def _token_derivatives(self, batches, vector, parts) -> None:
        if vector.untyped_storage().nbytes() != self.flat.values.untyped_storage().nbytes():
            vector = self.flat.zeros(self.flat.size + TAIL)[: self.flat.size].copy_(vector)
        vectors = self.flat.views(vector)
        for batch in batches:
            try:
                derivatives = self._forward_mode(batch, vectors)
            except NotImplementedError:  # an operation without a forward-mode derivative
                weights = batch.token_weights(candidates=True).requires_grad_()
                loss = torch.sum(self.losses(batch, candidates=True) * weights)
                grads = torch.autograd.grad(loss, self.flat.params, create_graph=True, materialize_grads=True)
                inner = torch.stack([torch.sum(g * v) for g, v in zip(grads, vectors, strict=True)]).sum()
                (derivatives,) = torch.autograd.grad(inner, weights)
            parts[batch.places()] += derivatives

    def _forward_mode(self, batch, vectors) -> Tensor:
        # A tangent whose storage is laid out as its primal's is used as it is; any other is copied together with a storage
        # of that size, here that of all parameters, for every parameter.
        tangents = {id(p): v for p, v in zip(self.flat.params, vectors, strict=True)}
        with torch.no_grad(), forward_ad.dual_level():
            dual_of = {id(p): forward_ad.make_dual(p.detach(), tangents[id(p)]) for p in self.flat.params}
            # Each place once: a module with two names would be given its duals twice, and keep the first ones.
            duals = {
                name: dual_of[id(p)]
                for prefix, module in self.losses.named_modules()
                for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False)
                if id(p) in tangents
            }
            return forward_ad.unpack_dual(
                functional_call(self.losses, duals, (batch, True), tie_weights=False)
            ).tangent


class CentralDifference(Derivatives):
    r"""
    Two gradients at \\( \phi_t \pm \epsilon \lambda_g \\): first-order operations only, so that any kernel will do (fused
    attention, compiled models, quantized base layers), with the memory of a training step.

    $$ H_t \lambda_g \approx \frac{\nabla L_t(\phi_t + \epsilon \lambda_g) - \nabla L_t(\phi_t - \epsilon \lambda_g)}{2 \epsilon},
       \quad \langle \nabla \ell_{ij}, \lambda_g \rangle \approx
       \frac{\ell_{ij}(\phi_t + \epsilon \lambda_g) - \ell_{ij}(\phi_t - \epsilon \lambda_g)}{2 \epsilon} $$

    Costs 6 forward passes a step (plain training: 3), 2 at the first step.

    The error is estimated from what is at hand. With \\( \Delta = \tfrac{1}{2} \mathrm{mean}_i |\ell_i^+ - \ell_i^-| \\) in nats per token
    and \\( \ell_i \\) from the forward sweep, it is the largest of

    - truncation, \\( 2 \rho^2 \\) with \\( \rho = \sum_i |\ell_i^+ - 2 \ell_i + \ell_i^-| / \sum_i |\ell_i^+ - \ell_i^-| \\);
    - rounding, \\( \nu / \Delta \\), where \\( \nu \\) is the mean loss in nats per token times the floating-point precision;
    - what the weighted sum of the examples' derivatives misses of \\( \langle g_t, \lambda_g \rangle \\), which the optimizer's
      adjoint knows.

    All of them look at losses. That \\( \epsilon^2 \lambda_g^\top H_t \lambda_g \\) should be
    \\( \sum_i w_i (\ell_i^+ - 2 \ell_i + \ell_i^-) / Z_t \\) is no test of the product in float32: at this \\( \epsilon \\) the second is a
    hundredth of the first difference, and rounding a tenth of it.

    \\( \epsilon \\) is chosen where the first two, \\( 2 \rho^2 \propto \epsilon^2 \\) and \\( \nu / \Delta \propto 1 / \epsilon \\), have the
    smallest sum, as measured at the step treated before; what is missed beyond rounding counts as truncation, if it is more.
    At the first one, or after one that fell back or taught nothing, it is such that the losses of a few examples change by 5e-4
    nats per token (in float32; 6e-7 in float64), or shorter if these say so. A step whose error is estimated above
    the tolerance is repeated, with a better \\( \epsilon \\) if there is one, or else by [`Exact`].

    Args:
        exact ([`Exact`]): What to fall back to.
        tolerance (`float`): Largest accepted estimate.
    """

    def __init__(self, exact: Exact, tolerance: float):
        super().__init__()
        self.exact = exact
        self.losses, self.flat, self.processes = exact.losses, exact.flat, exact.processes
        self.tolerance = tolerance
        self._distance = 0.0  # epsilon times the norm of lambda_g; 0 is not known yet
        self._position = 0.0  # the epsilon at which the parameters are

    def __call__(
        self,
        batches: list[MicroBatch],
        vector: Tensor,
        inner: float,
        example_losses: Tensor,
        token_metagradients: Tensor,
        buffer: Tensor | None,
    ) -> Tensor | None:
        """As of [`Derivatives`]."""
        # The second is slow, but cannot underflow.
        norm = vector.norm().item() or vector.norm(dtype=torch.float64).item()
        if norm == 0:
            self.errors.append(0.0)
            return None if buffer is None else buffer.zero_()[: self.flat.size]
        self._position = 0.0
        before = self._distance, len(self.errors), self.num_fallbacks
        try:
            return self._differentiate(batches, vector, norm, inner, example_losses, token_metagradients, buffer)
        except OutOfMemory:  # as it was, for whoever tries again
            self._distance, count, self.num_fallbacks = before
            del self.errors[count:]
            self._return(vector, last=buffer is None)
            raise

    def _differentiate(
        self, batches, vector, norm, inner, example_losses, token_metagradients, buffer
    ) -> Tensor | None:
        differences = torch.zeros_like(token_metagradients)
        if self._distance == 0:
            self._find_distance(batches, vector, norm, example_losses, differences, refine=buffer is not None)
        for _ in range(2):
            distance = self._distance
            error = self._run(batches, vector, norm, inner, example_losses, differences, buffer)
            if error <= self.tolerance or distance / 1.5 < self._distance < 1.5 * distance:
                break  # otherwise the step was of a wrong size, and once more is cheaper than exactly
        self.errors.append(error)
        if not error <= self.tolerance:  # also where it is not a number
            self.num_fallbacks += 1
            self._distance = 0.0  # nothing was learned about it
            self._return(vector, last=buffer is None)
            return self.exact(batches, vector, inner, example_losses, token_metagradients, buffer)
        epsilon = distance / norm
        token_metagradients += differences / (2 * epsilon)
        return None if buffer is None else buffer[: self.flat.size]

    def _find_distance(self, batches, vector, norm, example_losses, differences, refine: bool) -> None:
        """
        The distance at which the losses of a few examples change by `FIRST_CHANGE`, mostly by one forward pass over them; with
        `refine`, by two more, a shorter one if that is better for them, where they are few beside the batch: cheaper than two
        gradients of it at a wrong one.
        """
        size = self.flat.values.norm().item() or 1.0
        self._distance, self._farthest = FIRST_DISTANCE * size, 0.1 * size
        wanted = FIRST_CHANGE * torch.finfo(self.flat.dtype).eps ** (1 / 3)
        # as many examples whatever the size of micro-batches, on which the step should not depend
        num = sum(len(batch.indices) for batch in batches)
        rows = min(PROBED, max(2, num // PROBED))
        few = []
        for batch in batches:
            few += [batch.first(rows)] if rows > 0 else []
            rows -= len(batch.indices)
        for _ in range(4):
            self._move_to(self._distance / norm, vector)
            sums = [0.0, 0.0, float(num)]
            with self.processes.summing(self.flat.zeros(TAIL), sums), torch.no_grad():
                for batch in few:
                    values = batch.example_sums(self.losses(batch)[:, 0])
                    change = (values - example_losses[batch.indices]) / (batch.scale * batch.num_supervised)
                    sums[0] += len(batch.indices)
                    sums[1] += change.abs().sum().item()
            count, change, total = sums
            if count == 0:
                break
            # Of a change that is little more than rounding, or no longer linear, less follows.
            factor = min(max(wanted * count / change, 0.01), 100.0) if change > 0 else 100.0
            distance = self._distance
            self._distance = min(distance * (factor if math.isfinite(change) else 0.01), self._farthest)
            if 0.1 < factor < 10 or self._distance == distance:
                break
        if refine and 0 < 4 * count <= total:
            distance = self._distance
            self._run(few, vector, norm, None, example_losses, differences, None)
            self._distance = min(self._distance, distance)  # a few say little about how far one may go with all

    def _return(self, vector: Tensor, last: bool) -> None:
        r"""Back to \\( \phi_t \\): to rounding, or exactly if it is the first, which comes last."""
        if last:
            self.flat.load_originals(0, self.flat.values)
        else:
            self._move_to(0.0, vector)

    def _move_to(self, epsilon: float, vector: Tensor) -> None:
        self.flat.values.add_(vector, alpha=epsilon - self._position)
        self._position = epsilon

    def _run(self, batches, vector, norm, inner, example_losses, differences, buffer) -> float:
        """
        Fills `differences` and `buffer`, chooses the next distance and returns the estimated error. `inner` is `None` where
        `batches` are not all that it is the sum over.
        """
        epsilon = self._distance / norm
        sums: list[float] = [0.0, 0.0, 0.0, 0.0, 0.0, inner or 0.0, 0.0]
        with _summing(self.flat, self.processes, buffer, sums):
            differences.zero_()
            odd, even = torch.zeros_like(example_losses), torch.zeros_like(example_losses)
            for sign in (1, -1):
                self._move_to(sign * epsilon, vector)
                for batch in batches:
                    with torch.set_grad_enabled(buffer is not None):
                        values = self.losses(batch, candidates=True)
                    if buffer is not None:
                        weights = batch.token_weights(candidates=True) * (sign / (2 * epsilon))
                        values.backward(weights, inputs=self.flat.params)
                    values = values.detach()
                    differences[batch.places()] += sign * values
                    change = batch.example_sums(values[:, 0]) - example_losses[batch.indices]
                    odd[batch.indices] += sign * change
                    even[batch.indices] += change
            for batch in batches:
                nats = 1 / (batch.scale * batch.num_supervised).to(odd)
                weighted = odd[batch.indices] * batch.weights.to(odd) / (2 * epsilon)
                sums[0] += len(batch.indices)
                sums[1] += (example_losses[batch.indices] * nats).sum().item()
                sums[2] += (odd[batch.indices] * nats).abs().sum().item()
                sums[3] += (even[batch.indices] * nats).abs().sum().item()
                sums[4] += weighted.sum().item()
                sums[6] += weighted.abs().sum().item()
        count, loss, first, second, found, expected, size = sums
        if count == 0:  # no example with a supervised token on any process: all derivatives are 0
            return 0.0
        if not math.isfinite(first + second + loss + found):
            self._distance /= 10
            return math.inf
        if first == 0:  # nothing moved beyond rounding
            self._distance = min(100 * self._distance, self._farthest)
            return math.inf
        rounding = torch.finfo(self.flat.dtype).eps * 2 * loss / first
        missed = abs(found - expected) / size if size > 0 and inner is not None else 0.0
        # One example that is far less linear than the others hardly shows in means, but in what is missed.
        truncation = max(2 * max((second / first) ** 2 - rounding**2, 0.0), missed - rounding)
        factor = (rounding / (2 * max(truncation, 1e-12))) ** (1 / 3)
        # Of a change that is little more than rounding, the second difference says nothing.
        self._distance = min(self._distance * min(max(factor, 0.1), max(10.0, rounding / 1e-3)), self._farthest)
        return max(truncation, rounding, missed)


def _summing(
    flat: FlatParameters, processes: Processes, buffer: Tensor | None, scalars: list[float]
) -> AbstractContextManager[None]:
    """[`Processes.summing`], where backward passes accumulate into `buffer`, if there is one."""
    return processes.summing(flat.zeros(TAIL) if buffer is None else flat.accumulate_into(buffer), scalars)
