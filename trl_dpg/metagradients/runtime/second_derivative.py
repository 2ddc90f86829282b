r"""
Whether operations that are not PyTorch's own can be differentiated twice.

Liger's functions, Hub kernels and the like may compute their gradient outside of autograd, in place even, without saying that it has
no derivative. Double backward then goes on as if it were a constant, and its Hessian-vector products are wrong.
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


PYTORCH = re.compile(r"\w+Backward\d+|torch::autograd::\w+")  # what PyTorch's own nodes of a graph are called
OURS = __package__.split(".")[0]

NUM_EXAMPLES = 2
DISTANCES = (1e-3, 3e-4, 1e-4, 3e-5)  # of a central difference, in norms of the parameters
TOLERANCE = 0.01  # of a product, relative
EXACTLY = 1e-3  # of what the same gradient says twice

_CHECKED: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()  # whether products were, too


def check_second_derivatives(exact: "Exact", batches: list[MicroBatch], product: Tensor | None) -> None:
    r"""
    Raises a [`ValueError`] where operations that are not PyTorch's make exact derivatives of a model wrong. Looks once per model.

    Along the gradient \\( g \\) of a few examples, \\( \sum_{ij} w_{ij} \langle \nabla \ell_{ij}, g \rangle \\) is compared with
    \\( \langle g, g \rangle \\), and \\( H g \\) with central differences of gradients.

    Costs one forward pass of an example. Where there are such operations, up to ten training steps on two, and memory for six
    copies of the trained parameters.

    Args:
        exact ([`Exact`]): What differentiates.
        batches (`list[MicroBatch]`): This process's part of a batch.
        product (`Tensor`, *optional*): Where Hessian-vector products accumulate, if they are needed.
    """
    model, with_product = exact.token_losses.model, product is not None
    if not batches or model in _CHECKED and _CHECKED[model] >= with_product:
        return
    with saved_tensors_hooks(lambda tensor: None, lambda kept: kept):  # the graph is looked at, not run
        names = foreign_operations(exact.token_losses(batches[0].first(1)).sum())
    if names and exact.space.processes.in_step:
        raise ValueError(
            f"`curvature='exact'` needs second derivatives. `model` runs {', '.join(names)}, which is not PyTorch's own, and whether its "
            'derivatives are right is not looked at where the model is in shards. Set `curvature="central_difference"`.'
        )
    if names and not is_twice_differentiable(exact, batches[0].first(NUM_EXAMPLES), with_product):
        raise ValueError(
            f"`curvature='exact'` needs second derivatives, but those of `model` are wrong: it runs {', '.join(names)}, which PyTorch "
            'cannot differentiate twice. Set `curvature="central_difference"`, or leave out what put that there '
            "(`use_liger_kernel`, which changes all models of an architecture, or `use_kernels`)."
        )
    if names and product is not None:
        exact.space.accumulate_into(product)
    _CHECKED[model] = with_product


def foreign_operations(loss: Tensor) -> list[str]:
    """Names of the operations in a graph whose derivative is neither PyTorch's own nor this package's."""
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
    """Whether exact derivatives along a batch's gradient are those that first-order gradients say."""
    space, losses = exact.space, exact.token_losses
    bf16, losses.bf16 = losses.bf16, False  # in whose rounding small differences vanish
    phi = space.phi.clone()
    try:
        vector = _gradient(exact, batch)
        product = space.buffer()
        space.accumulate_into(product)
        differentiate = exact._double_backward if with_product else exact._forward_mode
        result = differentiate(batch, space.views(vector))
        found, expected = (result * batch.token_weights(candidates=True)).sum(), vector.square().sum()
        if (
            not (found - expected).abs() <= EXACTLY * expected
        ):  # also of a function that is marked as once differentiable
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
    Whether central differences agree with a product. They do not where two of them agree with each other, but not with it.

    Differences that rounding or kinks (ReLU) spoil do not agree with each other, and prove nothing.
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
