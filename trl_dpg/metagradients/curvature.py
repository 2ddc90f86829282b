"""Derivatives of one batch's loss: gradient, Hessian-vector product and metagradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .model import TargetModel
from .objective import MicroBatch, example_losses


def gradient(
    model: TargetModel, params: Sequence[nn.Parameter], batches: list[MicroBatch]
) -> tuple[float, list[Tensor]]:
    r"""
    Loss \\( L_t \\) and gradient \\( g_t = \nabla_\phi L_t(\phi_t; w) \\), summed over this process's micro-batches.
    """
    loss = 0.0
    grads = [torch.zeros_like(p) for p in params]
    for batch in batches:
        value = torch.dot(example_losses(model, batch), batch.weights)
        loss += value.item()
        _accumulate_(grads, torch.autograd.grad(value, params, materialize_grads=True))
    return loss, grads


def hessian_vector_product(
    model: TargetModel,
    params: Sequence[nn.Parameter],
    batches: list[MicroBatch],
    vector: list[Tensor],
    metagradients: Tensor,
) -> list[Tensor]:
    r"""
    Exact \\( H_t \lambda_g \\) by double backward on the real module.

    The weights \\( w \\) are a leaf of the same graph, so the pass also gives every example's
    \\( \langle \nabla_\phi \ell_i(\phi_t), \lambda_g \rangle / Z_t \\), which is added to `metagradients`, shape `(n,)`.
    """
    product = [torch.zeros_like(p) for p in params]
    for batch in batches:
        weights = batch.weights.clone().requires_grad_()
        inner = _directional_derivative(model, params, batch, weights, vector)
        *parts, example_parts = torch.autograd.grad(inner, [*params, weights], materialize_grads=True)
        _accumulate_(product, parts)
        metagradients[batch.indices] += example_parts.to(metagradients)
    return product


def example_derivatives(
    model: TargetModel,
    params: Sequence[nn.Parameter],
    batches: list[MicroBatch],
    vector: list[Tensor],
    metagradients: Tensor,
) -> None:
    r"""
    Only \\( \langle \nabla_\phi \ell_i(\phi_t), \lambda_g \rangle / Z_t \\), added to `metagradients`, shape `(n,)`.

    This is all that the first step needs, as nothing lies before it. One forward pass with forward-mode differentiation
    gives it for all examples, without a graph; double backward does where an operation has no forward-mode derivative.
    """
    for batch in batches:
        try:
            example_parts = _forward_mode(model, params, batch, vector)
        except NotImplementedError:
            weights = batch.weights.clone().requires_grad_()
            inner = _directional_derivative(model, params, batch, weights, vector)
            (example_parts,) = torch.autograd.grad(inner, weights)
        metagradients[batch.indices] += example_parts.to(metagradients)


def _forward_mode(model, params, batch, vector) -> Tensor:
    tangents = {id(p): v for p, v in zip(params, vector, strict=True)}
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(p.detach(), tangents[id(p)])
            for name, p in model.named_parameters()
            if id(p) in tangents
        }
        losses = functional_call(_Losses(model), {f"model.{name}": dual for name, dual in duals.items()}, (batch,))
        return forward_ad.unpack_dual(losses).tangent


class _Losses(nn.Module):
    """`example_losses` as a module, which is what `functional_call` takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Tensor:
        return example_losses(self.model, batch)


def _directional_derivative(model, params, batch, weights, vector) -> Tensor:
    loss = torch.dot(example_losses(model, batch), weights)
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    return torch.stack([torch.sum(g * v) for g, v in zip(grads, vector, strict=True)]).sum()


@contextmanager
def twice_differentiable_attention(model: TargetModel) -> Iterator[None]:
    """
    Runs attention by kernels that have a second derivative, and restores the model's implementation on leaving.

    SDPA keeps its interface but takes the math kernel; anything else than SDPA and eager becomes eager.
    """
    implementation = model.config._attn_implementation
    replaced = implementation not in (None, "eager", "sdpa")
    if replaced:
        model.set_attn_implementation("eager")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if replaced:
            model.set_attn_implementation(implementation)


def _accumulate_(totals: list[Tensor], parts: Sequence[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)
