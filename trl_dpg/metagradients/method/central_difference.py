r"""Derivatives along \\( \lambda_g \\) by central differences."""

import math
from typing import Any

import torch
from torch import Tensor

from ..runtime.examples import MicroBatch
from ..runtime.host import double
from .exact import Direction, Exact


# The search for a first step length
FIRST_LENGTH = 1e-4  # where the search begins, in norms of the parameters
FIRST_CHANGE = 0.1  # wanted change of the loss, in nats per token; is multiplied by the cube root of machine epsilon
MOST_PROBED = 8  # most examples per process to search with
SHARE_PROBED = 1 / 8  # share of the process's batch to search with


class CentralDifference:
    r"""
    Derivatives from two gradients, at \\( \phi_t \pm \epsilon \lambda_g \\). No second derivative is computed, so any kernel will do
    (fused attention, compiled models, quantized base layers). The memory is that of a training step.

    $$ H_t \lambda_g \approx \frac{\nabla L_t(\phi_t + \epsilon \lambda_g) - \nabla L_t(\phi_t - \epsilon \lambda_g)}{2 \epsilon},
       \quad \langle \nabla \ell_{ij}, \lambda_g \rangle \approx
       \frac{\ell_{ij}(\phi_t + \epsilon \lambda_g) - \ell_{ij}(\phi_t - \epsilon \lambda_g)}{2 \epsilon} $$

    A step takes about as long as 6 forward passes, the first step as 2. A step of plain training takes 3.

    The error is estimated from losses. With \\( \Delta = \tfrac{1}{2} \mathrm{mean}_i |\ell_i^+ - \ell_i^-| \\) in nats per token
    and \\( \ell_i \\) from the forward sweep, the estimate is the largest of

    - truncation, \\( 2 \max(\rho^2 - R^2, 0) \\) with \\( \rho = \sum_i |\ell_i^+ - 2 \ell_i + \ell_i^-| / \sum_i |\ell_i^+ - \ell_i^-| \\);
    - rounding, \\( R = \nu / \Delta \\), where \\( \nu \\) is the mean loss in nats per token times the floating-point precision;
    - the mismatch, the relative difference between the weighted sum of the examples' derivatives and
      \\( \langle g_t, \lambda_g \rangle \\), which the optimizer's adjoint gives.

    The next step takes the length \\( \epsilon \lVert \lambda_g \rVert \\) that minimizes the sum of truncation,
    \\( \propto \epsilon^2 \\), and rounding, \\( \propto 1 / \epsilon \\). If the mismatch exceeds rounding by more than the truncation
    estimate, the excess is used as the truncation. The first \\( \epsilon \\) changes the losses of a few examples by 5e-4 nats per token
    (6e-7 in float64). It is smaller if the best \\( \epsilon \\) of these examples is smaller. If a step's error is above
    `tolerance`, the step is repeated once with a better \\( \epsilon \\), if there is one, and then by `exact`.
    """

    def __init__(self, exact: Exact, tolerance: float):
        self.exact, self.tolerance = exact, tolerance
        self.token_losses, self.space = exact.token_losses, exact.space
        self.errors: list[
            float
        ] = []  # estimated error of each step, the last step first; 0 if it was repeated exactly
        self.num_fallbacks = 0  # number of steps that were repeated exactly
        self._length = 0.0  # step length: epsilon times the norm of lambda_g; 0 while it is unknown
        self._epsilon_now = 0.0  # the epsilon by which the parameters are shifted now

    def __call__(self, batches: list[MicroBatch], direction: Direction, product: Tensor | None) -> list[Tensor]:
        """See [`Exact`]."""
        norm = self.space.norm(direction.vector)
        if norm == 0:
            self.errors.append(0.0)
            if product is not None:
                product.zero_()
            return [torch.zeros_like(batch.token_weights(candidates=True)) for batch in batches]
        self._epsilon_now, before = 0.0, self._length  # the caller has just loaded phi_t
        try:
            return self._differentiate(batches, direction, norm, product)
        except BaseException:  # the caller may try again with smaller micro-batches
            self._length = before
            self._move_to(0.0, direction.vector)
            raise

    def _differentiate(self, batches, direction, norm, product) -> list[Tensor]:
        if self._length == 0:
            self._find_first_length(batches, direction, norm, refine=product is not None)
        for _ in range(2):
            length = self._length
            results, error = self._difference(batches, direction, norm, product)
            length_was_good = length / 1.5 < self._length < 1.5 * length
            if error <= self.tolerance or length_was_good:
                break  # otherwise a second difference may do, and costs less than the exact derivatives
        accepted = error <= self.tolerance  # false for NaN
        if not accepted:
            self._length = 0.0  # this step says nothing about a good length
            self._move_to(0.0, direction.vector)
            if product is None:  # at the first step, the parameters are at hand without the rounding errors of moves
                self.space.load_originals(self.space.phi)
            results = self.exact(batches, direction, product)
        self.errors.append(error if accepted else 0.0)
        self.num_fallbacks += not accepted
        return results

    def _find_first_length(self, batches, direction, norm, refine: bool) -> None:
        """
        Finds the length at which the losses of a few examples change by `FIRST_CHANGE`. Mostly one forward pass over them is enough.

        With `refine`, two more passes may shorten the length, if these examples are at most a quarter of the batch. Two gradients of
        the batch at a wrong length would cost more.
        """
        param_norm = self.space.norm(self.space.phi) or 1.0
        self._length, self._farthest = FIRST_LENGTH * param_norm, 0.1 * param_norm
        wanted = FIRST_CHANGE * torch.finfo(self.space.dtype).eps ** (1 / 3)
        # The number of examples does not depend on the size of micro-batches, so neither does the length.
        num = sum(len(batch.input_ids) for batch in batches)
        rows = min(MOST_PROBED, max(2, int(num * SHARE_PROBED)))
        few = []
        for batch in batches:
            few += [batch.first(rows)] if rows > 0 else []
            rows -= len(batch.input_ids)
        for _ in range(4):
            self._move_to(self._length / norm, direction.vector)
            sums = [0.0, 0.0, float(num)]
            with self.space.summing_over_processes(None, sums), torch.no_grad():
                for batch in few:
                    losses = batch.example_sums(self.token_losses(batch)[:, 0])
                    moved = (losses - direction.example_losses[batch.indices]) * batch.nats_per_loss()
                    sums[0] += len(batch.indices)
                    sums[1] += moved.abs().sum().item()
            count, change, total = sums
            if count == 0:
                return
            # A change near rounding, or far from linear, says little: the factor is limited.
            factor = min(max(wanted * count / change, 0.01), 100.0) if change > 0 else 100.0
            length = self._length
            self._length = min(length * (factor if math.isfinite(change) else 0.01), self._farthest)
            if 0.1 < factor < 10 or self._length == length:
                break
        if refine and 4 * count <= total:
            length = self._length
            self._difference(few, direction._replace(dot_with_grad=math.nan), norm, None)
            self._length = min(self._length, length)  # a few examples do not show that all allow a longer step

    def _move_to(self, epsilon: float, vector: Tensor) -> None:
        self.space.phi.add_(vector, alpha=epsilon - self._epsilon_now)
        self._epsilon_now = epsilon

    def _difference(self, batches, direction, norm, product) -> tuple[list[Tensor], float]:
        """Computes two gradients, or without `product` two losses. Returns derivatives and their error, and sets the next length."""
        epsilon = self._length / norm
        results: list[Any] = [0.0 for _ in batches]
        changes: tuple[list[Tensor], list[Tensor]] = [], []
        sums = [0.0] * 6
        with self.space.summing_over_processes(product, sums):
            for sign, change in zip((1, -1), changes, strict=True):
                self._move_to(sign * epsilon, direction.vector)
                for i, batch in enumerate(batches):
                    with torch.set_grad_enabled(product is not None):
                        values = self.token_losses(batch, candidates=True)
                    if product is not None:
                        weights = batch.token_weights(candidates=True) * (sign / (2 * epsilon))
                        values.backward(weights, inputs=self.space.params)
                    values = values.detach()
                    change.append(batch.example_sums(values[:, 0]) - direction.example_losses[batch.indices])
                    results[i] = results[i] + sign * values
            for batch, ahead, behind in zip(batches, *changes, strict=True):
                odd, even, nats = ahead - behind, ahead + behind, batch.nats_per_loss()
                derivatives = odd * double(batch.weights) / (2 * epsilon)
                losses = direction.example_losses[batch.indices] * nats
                columns = losses, (odd * nats).abs(), (even * nats).abs(), derivatives, derivatives.abs()
                parts = len(batch.indices), *(column.sum().item() for column in columns)
                sums[:] = [total + part for total, part in zip(sums, parts, strict=True)]
        return [result / (2 * epsilon) for result in results], self._estimate_and_adapt(sums, direction.dot_with_grad)

    def _estimate_and_adapt(self, sums: list[float], dot_with_grad: float) -> float:
        """Returns the estimated error of a difference, and sets the next length. Without all examples, `dot_with_grad` is NaN."""
        count, loss_sum, odd_sum, even_sum, derivative_sum, derivative_size = sums
        if count == 0:  # no supervised token on any process: all derivatives are 0, and a good length stays unknown
            self._length = 0.0
            return 0.0
        if not math.isfinite(odd_sum + even_sum + loss_sum + derivative_sum):
            self._length /= 10
            return math.inf
        if odd_sum == 0:  # no loss moved by more than rounding
            self._length = min(100 * self._length, self._farthest)
            return math.inf
        rounding = torch.finfo(self.space.dtype).eps * 2 * loss_sum / odd_sum
        is_known = derivative_size > 0 and not math.isnan(dot_with_grad)
        mismatch = abs(derivative_sum - dot_with_grad) / derivative_size if is_known else 0.0
        # If one example is far less linear than the others, the means hardly show it, but the mismatch does.
        truncation = max(2 * max((even_sum / odd_sum) ** 2 - rounding**2, 0.0), mismatch - rounding)
        factor = (rounding / (2 * max(truncation, 1e-12))) ** (1 / 3)
        # Near rounding, the second difference says nothing: the factor is limited.
        self._length = min(self._length * min(max(factor, 0.1), max(10.0, rounding / 1e-3)), self._farthest)
        return max(truncation, rounding, mismatch)
