r"""
Second-order graphs that leave out what a Hessian-vector product does not need.

A product by double backward differentiates \\( \langle g, \lambda \rangle \\), of which it does not need the value, and so not
\\( g \\) either. For a layer \\( y = x W^\top \\), that leaves out one of nine matrix products, and what would be the largest
tensor of the graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..runtime.sharding import split


class WithoutWeightGradients(TorchFunctionMode):
    """
    Has linear layers build graphs in which the gradients of their weights are zeros with the right derivatives.

    The zeros are values that nobody reads. Gradients of computed weights are left as they are, since more is computed from them.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not kwargs and func is F.linear and isinstance(args[1], nn.Parameter) and args[1].requires_grad:
            product = _Linear.apply(args[0], *split(args[1]), True)
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if not kwargs and func is torch.addmm and isinstance(args[2], nn.Parameter) and args[2].requires_grad:
            return args[0] + _Linear.apply(args[1], *split(args[2]), False)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    r"""
    \\( x W^\top \\), or \\( x W \\). Of a weight in shards, each pass gathers it for itself, and gives its part of the gradient away at
    once: what a graph holds until its last pass is no more than this process's part.
    """

    @staticmethod
    def forward(ctx, x, weight, layout, transposed):
        ctx.save_for_backward(x, weight)
        ctx.layout, ctx.transposed = layout, transposed
        weight = weight if layout is None else layout.whole(weight)
        return x @ (weight.T if transposed else weight)

    @staticmethod
    def backward(ctx, cotangent):
        (x, weight), layout = ctx.saved_tensors, ctx.layout
        of_x = None
        if ctx.needs_input_grad[0]:
            whole = weight if layout is None else layout.whole(weight)
            of_x = cotangent @ (whole if ctx.transposed else whole.T)
        if torch.is_grad_enabled():  # the first pass, which builds the graph of the second
            return of_x, _LeftOutGradient.apply(cotangent, x, weight.shape, layout, ctx.transposed), None, None
        rows, inputs = cotangent.flatten(0, -2), x.flatten(0, -2)
        of_weight = rows.T @ inputs if ctx.transposed else inputs.T @ rows
        return of_x, of_weight if layout is None else layout.scatter(of_weight), None, None


class _LeftOutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cotangent, x, shape, layout, transposed):
        ctx.save_for_backward(cotangent, x)
        ctx.layout, ctx.transposed = layout, transposed
        return zeros(x, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, direction):
        cotangent, x = ctx.saved_tensors
        direction = direction if ctx.layout is None else ctx.layout.gather(direction)
        direction = direction if ctx.transposed else direction.T
        of_cotangent = x @ direction.T if ctx.needs_input_grad[0] else None
        return of_cotangent, cotangent @ direction if ctx.needs_input_grad[1] else None, None, None, None


def zeros(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Zeros of a shape, in the memory of one."""
    return like.new_zeros(()).expand(shape)
