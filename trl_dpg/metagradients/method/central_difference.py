r"""Derivatives along \\( \lambda_g \\) by central differences."""

import math

import torch
from torch import Tensor

from ..runtime.examples import MicroBatch
from ..runtime.host import double
from .differentiator import Direction, LossDifferentiator
from .exact import Exact


# The search for a first step length
FIRST_LENGTH = 1e-4  # where it begins, in norms of the parameters
FIRST_CHANGE = 0.1  # the change of loss it looks for: nats per token, times the cube root of machine epsilon
MOST_PROBED = 8  # examples of a process
SHARE_PROBED = 1 / 8  # of its batch


class CentralDifference(LossDifferentiator):
    r"""
    Two gradients at \\( \phi_t \pm \epsilon \lambda_g \\). All operations are of first order, so any kernel will do (fused attention,
    compiled models, quantized base layers), with the memory of a training step.

    $$ H_t \lambda_g \approx \frac{\nabla L_t(\phi_t + \epsilon \lambda_g) - \nabla L_t(\phi_t - \epsilon \lambda_g)}{2 \epsilon},
       \quad \langle \nabla \ell_{ij}, \lambda_g \rangle \approx
       \frac{\ell_{ij}(\phi_t + \epsilon \lambda_g) - \ell_{ij}(\phi_t - \epsilon \lambda_g)}{2 \epsilon} $$

    Takes about as long as 6 forward passes a step (plain training: 3), 2 at the first step.

    The error is estimated from losses. With \\( \Delta = \tfrac{1}{2} \mathrm{mean}_i |\ell_i^+ - \ell_i^-| \\) in nats per token
    and \\( \ell_i \\) from the forward sweep, it is the largest of

    - truncation, \\( 2 \rho^2 \\) with \\( \rho = \sum_i |\ell_i^+ - 2 \ell_i + \ell_i^-| / \sum_i |\ell_i^+ - \ell_i^-| \\);
    - rounding, \\( \nu / \Delta \\), where \\( \nu \\) is the mean loss in nats per token times the floating-point precision;
    - what the weighted sum of the examples' derivatives misses of \\( \langle g_t, \lambda_g \rangle \\), which the optimizer's
      adjoint knows.

    The next \\( \epsilon \\) is where truncation, \\( \propto \epsilon^2 \\), and rounding, \\( \propto 1 / \epsilon \\), have the smallest sum.
    What is missed beyond rounding counts as truncation, if it is more. The first \\( \epsilon \\) changes the losses of a few examples by
    5e-4 nats per token (6e-7 in float64), or by less where that is better for them. A step whose error is above the tolerance is
    repeated once with a better \\( \epsilon \\), if there is one, and then by [`Exact`].

    Args:
        exact ([`Exact`]): What to fall back to.
        tolerance (`float`): Largest accepted estimate.
    """

    def __init__(self, exact: Exact, tolerance: float):
        super().__init__(exact.token_losses, exact.space)
        self.exact = exact
        self.tolerance = tolerance
        self._length = 0.0  # of the step: epsilon times the norm of lambda_g; 0 is not known yet
        self._epsilon_now = 0.0  # at which the parameters are

    def __call__(self, batches: list[MicroBatch], direction: Direction, product: Tensor | None) -> list[Tensor]:
        """As of [`LossDifferentiator`]."""
        norm = self.space.norm(direction.vector)
        if norm == 0:
            self.errors.append(0.0)
            if product is not None:
                product.zero_()
            return [torch.zeros_like(batch.token_weights(candidates=True)) for batch in batches]
        self._epsilon_now = 0.0
        before = self._length, len(self.errors), self.num_fallbacks
        try:
            return self._differentiate(batches, direction, norm, product)
        except BaseException:  # as it was, for whoever tries again
            self._length, count, self.num_fallbacks = before
            del self.errors[count:]
            self._move_to(0.0, direction.vector)
            raise

    def _differentiate(self, batches, direction, norm, product) -> list[Tensor]:
        if self._length == 0:
            self._find_first_length(batches, direction, norm, refine=product is not None)
        for _ in range(2):
            length = self._length
            results, error = self._difference(batches, direction, norm, product)
            if error <= self.tolerance or length / 1.5 < self._length < 1.5 * length:
                break  # otherwise the step was of a wrong size, and once more is cheaper than exactly
        accepted = error <= self.tolerance  # which a NaN fails
        self.errors.append(error if accepted else 0.0)
        if accepted:
            return results
        self.num_fallbacks += 1
        self._length = 0.0  # nothing was learned about it
        if product is None:  # the first step, which may start from what is exact
            self.space.load_originals(self.space.phi)
            self._epsilon_now = 0.0
        else:
            self._move_to(0.0, direction.vector)
        return self.exact(batches, direction, product)

    def _find_first_length(self, batches, direction, norm, refine: bool) -> None:
        """
        The length at which the losses of a few examples change by `FIRST_CHANGE`, mostly by one forward pass over them.

        With `refine`, two more try a shorter one, where these examples are few beside the batch: that is cheaper than two gradients
        of the batch at a wrong length.
        """
        size = self.space.norm(self.space.phi) or 1.0
        self._length, self._farthest = FIRST_LENGTH * size, 0.1 * size
        wanted = FIRST_CHANGE * torch.finfo(self.space.dtype).eps ** (1 / 3)
        # as many examples whatever the size of micro-batches, on which the step should not depend
        num = sum(len(batch.input_ids) for batch in batches)
        rows = min(MOST_PROBED, max(2, int(num * SHARE_PROBED)))
        few = []
        for batch in batches:
            few += [batch.first(rows)] if rows > 0 else []
            rows -= len(batch.input_ids)
        for _ in range(4):
            count, change, total = self._change(few, direction, norm, num)
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
            self._length = min(self._length, length)  # a few say little about how far one may go with all

    def _change(self, few, direction, norm, num: int) -> list[float]:
        """Of few examples: how many, their change of loss in nats per token; and how many there are in all."""
        self._move_to(self._length / norm, direction.vector)
        sums = [0.0, 0.0, float(num)]
        with self.space.summing_over_processes(None, sums), torch.no_grad():
            for batch in few:
                values = batch.example_sums(self.token_losses(batch)[:, 0])
                change = (values - direction.example_losses[batch.indices]) / double(
                    batch.scale * batch.num_supervised
                )
                sums[0] += len(batch.indices)
                sums[1] += change.abs().sum().item()
        return sums

    def _move_to(self, epsilon: float, vector: Tensor) -> None:
        self.space.phi.add_(vector, alpha=epsilon - self._epsilon_now)
        self._epsilon_now = epsilon

    def _difference(self, batches, direction, norm, product) -> tuple[list[Tensor], float]:
        """The two gradients, or without `product` their losses: derivatives and their estimated error. Chooses the next length."""
        epsilon = self._length / norm
        results: list[Tensor] = []
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
                    if sign > 0:
                        results.append(values)
                    else:
                        results[i] = (results[i] - values) / (2 * epsilon)
            for batch, ahead, behind in zip(batches, *changes, strict=True):
                odd, even = ahead - behind, ahead + behind
                nats = 1 / double(batch.scale * batch.num_supervised)
                weighted = odd * double(batch.weights) / (2 * epsilon)
                losses = direction.example_losses[batch.indices] * nats
                columns = losses, (odd * nats).abs(), (even * nats).abs(), weighted, weighted.abs()
                parts = len(batch.indices), *(column.sum().item() for column in columns)
                sums[:] = [total + part for total, part in zip(sums, parts, strict=True)]
        return results, self._estimate_and_adapt(sums, direction.dot_with_grad)

    def _estimate_and_adapt(self, sums: list[float], inner: float) -> float:
        """Estimated error of a difference, and the next length. `inner` is not a number where the sums are not over all examples."""
        count, loss, first, second, found, size = sums
        if count == 0:  # no supervised token on any process: all derivatives are 0, and nothing was learned
            self._length = 0.0
            return 0.0
        if not math.isfinite(first + second + loss + found):
            self._length /= 10
            return math.inf
        if first == 0:  # nothing moved beyond rounding
            self._length = min(100 * self._length, self._farthest)
            return math.inf
        rounding = torch.finfo(self.space.dtype).eps * 2 * loss / first
        missed = abs(found - inner) / size if size > 0 and not math.isnan(inner) else 0.0
        # One example that is far less linear than the others hardly shows in means, but in what is missed.
        truncation = max(2 * max((second / first) ** 2 - rounding**2, 0.0), missed - rounding)
        factor = (rounding / (2 * max(truncation, 1e-12))) ** (1 / 3)
        # Near rounding, the second difference says nothing: the factor is limited.
        self._length = min(self._length * min(max(factor, 0.1), max(10.0, rounding / 1e-3)), self._farthest)
        return max(truncation, rounding, missed)
