r"""
Check that operations from outside of PyTorch can be differentiated twice.

Functions such as those of Liger or Hub kernels may compute their gradient outside of autograd, without marking it as not
differentiable. Double backward then treats this gradient as a constant, and its Hessian-vector products are wrong.
"""

import re
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

from .examples import MicroBatch


if TYPE_CHECKING:
    from ..method.exact import Exact


PYTORCH = re.compile(r"\w+Backward\d+|torch::autograd::\w+")  # names of PyTorch's own nodes in a graph
OURS = __package__.split(".")[0]

NUM_EXAMPLES = 2
DISTANCES = (1e-3, 3e-4, 1e-4, 3e-5)  # steps of central differences, in norms of the parameters
TOLERANCE = 0.01  # relative tolerance of a product against central differences
EXACTLY = 1e-3  # relative tolerance of <g, g> from double backward against that from one backward pass

_CHECKED: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()  # whether products were checked, too


def check_second_derivatives(exact: "Exact", batches: list[MicroBatch], product: Tensor | None) -> None:
    r"""
    Raises a [`ValueError`] if operations from outside of PyTorch make exact derivatives of a model wrong. Checks each model once.

    Takes the gradient \\( g \\) of a few examples. Compares \\( \sum_{ij} w_{ij} \langle \nabla \ell_{ij}, g \rangle \\) with
    \\( \langle g, g \rangle \\), and \\( H g \\) with central differences of gradients.

    Costs one forward pass of an example. If there are such operations, it also costs up to ten training steps on two examples, and
    memory for six copies of the trained parameters.

    Args:
        exact ([`Exact`]): Computes the exact derivatives.
        batches (`list[MicroBatch]`): This process's part of a batch.
        product (`Tensor`, *optional*): Accumulates Hessian-vector products, if they are needed.
    """
    model, with_product = exact.token_losses.model, product is not None
    if not batches or model in _CHECKED and _CHECKED[model] >= with_product:
        return
    with saved_tensors_hooks(lambda tensor: None, lambda kept: kept):  # the graph is read, not run
        names = foreign_operations(exact.token_losses(batches[0].first(1)).sum())
    if names and exact.space.processes.in_step:
        raise ValueError(
            f"`curvature='exact'` needs second derivatives. `model` runs {', '.join(names)}, which is not from PyTorch. The derivatives of "
            'such operations cannot be checked if the model is in shards. Set `curvature="central_difference"`.'
        )
    if names and not is_twice_differentiable(exact, batches[0].first(NUM_EXAMPLES), with_product):
        raise ValueError(
            f"`curvature='exact'` needs second derivatives, but those of `model` are wrong: it runs {', '.join(names)}, which PyTorch "
            'cannot differentiate twice. Set `curvature="central_difference"`, or turn off the option that brought these operations in '
            "(`use_liger_kernel`, which changes all models of an architecture, or `use_kernels`)."
        )
    if names and product is not None:
        exact.space.accumulate_into(product)
    _CHECKED[model] = with_product


def foreign_operations(loss: Tensor) -> list[str]:
    """Names of the operations in a graph that come neither from PyTorch nor from this package."""
    found, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):  # written in Python
            function: type = node._forward_cls  # type: ignore[attr-defined]
            found.update({function.__name__} if function.__module__.split(".")[0] != OURS else ())
        elif not PYTORCH.fullmatch(node.name()):
            found.add(node.name())
        nodes += [before for before, _ in node.next_functions]
    return sorted(found)


def is_twice_differentiable(exact: "Exact", batch: MicroBatch, with_product: bool) -> bool:
    """Whether exact derivatives along a batch's gradient agree with those from first-order gradients."""
    space, losses = exact.space, exact.token_losses
    bf16, losses.bf16 = losses.bf16, False  # rounding to bfloat16 would hide small differences
    phi = space.phi.clone()
    try:
        vector = _gradient(exact, batch)
        product = space.buffer()
        space.accumulate_into(product)
        differentiate = exact._double_backward if with_product else exact._forward_mode
        result = differentiate(batch, list(zip(space.params, space.views(vector), strict=True)))
        found, expected = (result * batch.token_weights(candidates=True)).sum(), vector.square().sum()
        # This also finds functions that are marked as once differentiable.
        if not (found - expected).abs() <= EXACTLY * expected:
            return False
        return not with_product or _agrees(exact, batch, vector, product, phi)
    finally:
        losses.bf16 = bf16
        space.phi.copy_(phi)
        space.release_gradients()


def _gradient(exact: "Exact", batch: MicroBatch) -> Tensor:
    buffer = exact.space.buffer()
    exact.space.accumulate_into(buffer)
    exact.token_losses(batch).backward(batch.token_weights(), inputs=exact.space.params)
    return buffer


def _agrees(exact: "Exact", batch: MicroBatch, vector: Tensor, product: Tensor, phi: Tensor) -> bool:
    """
    Whether central differences agree with a product. The answer is no if two differences agree with each other but not with it.

    If rounding or kinks (ReLU) spoil the differences, they do not agree with each other, and the answer is yes, because nothing is
    proved.
    """
    before = None
    for distance in DISTANCES:
        epsilon, difference = distance * phi.norm() / vector.norm(), torch.zeros_like(phi)
        for sign in (1, -1):
            torch.add(phi, vector, alpha=(sign * epsilon).item(), out=exact.space.phi)
            difference += sign / (2 * epsilon) * _gradient(exact, batch)
        error = (difference - product).norm()
        if error <= TOLERANCE * max(difference.norm(), product.norm()):
            return True
        if before is not None and (difference - before).norm() < error / 4:
            return False
        before = difference
    return True
