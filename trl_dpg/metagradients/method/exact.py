r"""Derivatives along \\( \lambda_g \\) by double backward."""

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from ..kernels import building_graph
from ..runtime.examples import MicroBatch
from ..runtime.host import double
from ..runtime.model import twice_differentiable
from ..runtime.second_derivative import check_second_derivatives
from ..runtime.sharding import split, standing_in
from .differentiator import Direction, LossDifferentiator


class Exact(LossDifferentiator):
    r"""
    Double backward on the real module: any twice differentiable model, to rounding error.

    The weights \\( w_{ij} \\) of tokens are a leaf of the graph of \\( \langle \nabla_\phi L_t(\phi; w), \lambda_g \rangle \\). So one backward
    pass gives both \\( H_t \lambda_g \\), its derivative in \\( \phi \\), and all \\( \langle \nabla_\phi \ell_{ij}, \lambda_g \rangle / Z_t \\).

    Takes about as long as 8 to 9 forward passes (plain training: 3), and about three times the memory of a training step's activations. At the
    first step, where no product is needed, forward-mode differentiation costs 3 and no graph.
    """

    def __call__(self, batches: list[MicroBatch], direction: Direction, product: Tensor | None) -> list[Tensor]:
        """As of [`LossDifferentiator`]."""
        results, sums = [], [0.0, 0.0]
        with self.space.summing_over_processes(product, sums), twice_differentiable(self.token_losses.model):
            vectors = self.space.views(direction.vector)
            check_second_derivatives(self, batches, product)
            for batch in batches:
                differentiate = self._forward_mode if product is None else self._double_backward
                result = differentiate(batch, vectors)
                weighted = batch.example_sums(result[:, 0]) * double(batch.weights)
                sums[0] += weighted.sum().item()
                sums[1] += weighted.abs().sum().item()
                results.append(result)
        found, size = sums
        if abs(found - direction.dot_with_grad) > 0.1 * size and not self.token_losses.bf16:
            warnings.warn(
                f"The examples' derivatives sum to {found:.3g}, but the training gradient says {direction.dot_with_grad:.3g}. Either they are "
                "nothing but rounding error (raise `learning_rate` or `adam_epsilon_root`), or the model's gradient is not "
                "the derivative of its loss, and its metagradients are wrong. `check_metagradients` tells which.",
                stacklevel=3,
            )
        return results

    def _double_backward(self, batch: MicroBatch, vectors: list[Tensor], want_product: bool = True) -> Tensor:
        """The product accumulates in the parameters' `.grad`, if it is wanted."""
        weights = batch.token_weights(candidates=True).requires_grad_()
        params = self.space.params
        with building_graph(self.token_losses.model, self.token_losses.bf16):
            loss = torch.sum(self.token_losses(batch, candidates=True) * weights)
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        # <g, lambda_g> is differentiated without being computed.
        reached = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
        if reached:
            outputs, cotangents = zip(*reached, strict=True)
            torch.autograd.backward(outputs, cotangents, inputs=[*params, weights] if want_product else [weights])
        return torch.zeros_like(weights) if weights.grad is None else weights.grad

    def _forward_mode(self, batch: MicroBatch, vectors: list[Tensor]) -> Tensor:
        r"""The change of the losses along \\( \lambda_g \\) alone, in forward mode."""
        # A tangent must be laid out as its parameter is. Otherwise PyTorch copies the storage of all parameters for each of them.
        tangents = {id(p): v for p, v in zip(self.space.params, vectors, strict=True)}
        try:
            with torch.no_grad(), forward_ad.dual_level():
                dual_of = {id(p): forward_ad.make_dual(p.detach(), tangents[id(p)]) for p in self.space.params}
                # Each place once: a module with two names would be given its duals twice, and keep the first ones.
                duals = {
                    name: standing_in(p, dual_of[id(split(p)[0])])
                    for prefix, module in self.token_losses.named_modules()
                    for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False)
                    if id(split(p)[0]) in tangents
                }
                dual = functional_call(self.token_losses, duals, (batch, True), tie_weights=False)
                return forward_ad.unpack_dual(dual).tangent
        except NotImplementedError:  # an operation without a forward-mode derivative
            return self._double_backward(batch, vectors, want_product=False)
