r"""
Second-order graphs of linear layers, without the weight gradients that a Hessian-vector product does not need.

A product by double backward differentiates \\( \langle g, \lambda \rangle \\). The value of this expression is not needed, so the
value of \\( g \\) is not needed either. Leaving out the gradient of \\( W \\) in a layer \\( y = x W^\top \\) saves one of nine matrix
products, and the largest tensor of the graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..runtime.sharding import split


class WithoutWeightGradients(TorchFunctionMode):
    """
    Makes linear layers build graphs in which the gradients of their weights are zeros with the right derivatives.

    The values of these gradients are never read. If a weight was computed from other tensors, its gradient is needed for theirs. It
    is then not replaced.
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
    \\( x W^\top \\), or \\( x W \\) if not `transposed`. If the weight is in shards, each pass gathers it anew, and reduces its gradient
    to shards at once. So the graph holds no more than this process's part of it.
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
        if torch.is_grad_enabled():  # the first backward pass, which builds the graph for the second
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
    """Zeros of a shape that take the memory of a single element."""
    return like.new_zeros(()).expand(shape)
