r"""Derivatives along \\( \lambda_g \\) by double backward."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from ..kernels import building_graph
from ..runtime.examples import MicroBatch
from ..runtime.host import double
from ..runtime.model import twice_differentiable
from ..runtime.second_derivative import check_second_derivatives
from ..runtime.sharding import split, standing_in
from ..runtime.workspace import Workspace
from .loss import TokenLosses


class Direction(NamedTuple):
    r"""The cotangent \\( \lambda_g \\) of a step's gradient, with two values to check derivatives along it."""

    vector: Tensor  # lambda_g, shape (size,)
    dot_with_grad: float  # <lambda_g, g_t>, from the adjoint of the update
    example_losses: Tensor  # l_i(phi_t) / Z_t of all examples, from the forward sweep, shape (n,)


class Exact:
    r"""
    Derivatives by double backward through the model. They are exact up to rounding, for any twice differentiable model.

    The weights \\( w_{ij} \\) of tokens are leaves of the graph of \\( \langle \nabla_\phi L_t(\phi; w), \lambda_g \rangle \\). One backward
    pass through this graph gives its derivatives in \\( \phi \\), which are \\( H_t \lambda_g \\), and in \\( w_{ij} \\), which are
    \\( \langle \nabla_\phi \ell_{ij}, \lambda_g \rangle / Z_t \\).

    A step takes about as long as 8 to 9 forward passes. A step of plain training takes 3. Activations take about three times the
    memory of a training step. The first step needs no product: forward-mode differentiation takes 3 forward passes there, and no graph.

    Forward mode and double backward leave out parameters that \\( \lambda_g \\) does not move. For a metric that reads the LM head alone,
    these are all others at the last step, unless this step clips.
    """

    def __init__(self, token_losses: TokenLosses, space: Workspace):
        self.token_losses, self.space = token_losses, space
        self.errors: list[float] = []  # stays empty, see [`~central_difference.CentralDifference`]
        self.num_fallbacks = 0

    def __call__(self, batches: list[MicroBatch], direction: Direction, product: Tensor | None) -> list[Tensor]:
        r"""
        Derivatives of the losses of this process's micro-batches along \\( \lambda_g \\), at the current values of the parameters.

        Returns \\( \langle \nabla_\phi \ell_{ij}(\phi_t), \lambda_g \rangle / Z_t \\) for each micro-batch, shape `(t, 1 + k)`. Column 0
        belongs to the `t` supervised tokens, the other columns to their `k` candidates. Writes \\( H_t \lambda_g \\) over all processes
        to `product`, shape `(size,)`, if it is not `None`.
        """
        results, sums = [], [0.0, 0.0]
        with self.space.summing_over_processes(product, sums), twice_differentiable(self.token_losses.model):
            moving = self._moving(direction.vector)
            check_second_derivatives(self, batches, product)
            for batch in batches:
                differentiate = self._forward_mode if product is None else self._double_backward
                result = differentiate(batch, moving)
                weighted = batch.example_sums(result[:, 0]) * double(batch.weights)
                sums[0] += weighted.sum().item()
                sums[1] += weighted.abs().sum().item()
                results.append(result)
        derivative_sum, derivative_size = sums
        if abs(derivative_sum - direction.dot_with_grad) > 0.1 * derivative_size and not self.token_losses.bf16:
            warnings.warn(
                f"The examples' derivatives sum to {derivative_sum:.3g}, but the training gradient says {direction.dot_with_grad:.3g}. "
                "Either the derivatives are mere rounding errors: raise `learning_rate` or `adam_epsilon_root`. Or the model's gradient is not the "
                "derivative of its loss, and metagradients are wrong. `check_metagradients` tells which is the case.",
                stacklevel=3,
            )
        return results

    def _moving(self, vector: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        r"""
        Trained parameters that \\( \lambda_g \\) moves, with their parts of it. Parts that are zero add nothing to
        \\( \langle g, \lambda_g \rangle \\). A model in shards leaves out nothing.
        """
        pairs = list(zip(self.space.params, self.space.views(vector), strict=True))
        if self.space.processes.in_step:  # a direction may be zero in one process's part, and all must gather alike
            return pairs
        moves = torch.stack([part.count_nonzero() for _, part in pairs]).tolist()
        # At a learning rate of 0, nothing moves. A graph needs an output all the same.
        return [pair for pair, moved in zip(pairs, moves, strict=True) if moved] or pairs[:1]

    def _double_backward(
        self, batch: MicroBatch, moving: list[tuple[nn.Parameter, Tensor]], want_product: bool = True
    ) -> Tensor:
        """Derivatives of the token losses. With `want_product`, the product accumulates in the parameters' `.grad`."""
        weights = batch.token_weights(candidates=True).requires_grad_()
        params, vectors = zip(*moving, strict=True)
        with building_graph(self.token_losses.model, self.token_losses.bf16):
            loss = torch.sum(self.token_losses(batch, candidates=True) * weights)
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        # This differentiates <g, lambda_g> without computing its value.
        reached = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
        if reached:
            outputs, cotangents = zip(*reached, strict=True)
            torch.autograd.backward(
                outputs, cotangents, inputs=[*self.space.params, weights] if want_product else [weights]
            )
        return torch.zeros_like(weights) if weights.grad is None else weights.grad

    def _forward_mode(self, batch: MicroBatch, moving: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        r"""Derivatives of the token losses along \\( \lambda_g \\) in forward mode, without the product."""
        try:
            with torch.no_grad(), forward_ad.dual_level():
                # A tangent needs the layout of its parameter. Otherwise PyTorch copies the storage of all parameters for each tangent.
                dual_of = {id(p): forward_ad.make_dual(p.detach(), vector) for p, vector in moving}
                # Each module is named once. A module with two names would get its duals twice, and would keep the first ones.
                duals = {
                    name: standing_in(p, dual_of[id(split(p)[0])])
                    for prefix, module in self.token_losses.named_modules()
                    for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False)
                    if id(split(p)[0]) in dual_of
                }
                dual = functional_call(self.token_losses, duals, (batch, True), tie_weights=False)
                losses, change = forward_ad.unpack_dual(dual)
                return torch.zeros_like(losses) if change is None else change
        except NotImplementedError:  # an operation without a forward-mode derivative
            return self._double_backward(batch, moving, want_product=False)
