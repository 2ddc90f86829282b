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


class WithoutWeightGradients(TorchFunctionMode):
    """
    Has linear layers build graphs in which the gradients of their weights are zeros with the right derivatives.

    The zeros are values that nobody reads. Gradients of computed weights are left as they are, since more is computed from them.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not kwargs and func is F.linear and isinstance(args[1], nn.Parameter) and args[1].requires_grad:
            product = _Linear.apply(args[0], args[1], True)
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if not kwargs and func is torch.addmm and isinstance(args[2], nn.Parameter) and args[2].requires_grad:
            return args[0] + _Linear.apply(args[1], args[2], False)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    r"""\\( x W^\top \\), or \\( x W \\)."""

    @staticmethod
    def forward(ctx, x, weight, transposed):
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return x @ (weight.T if transposed else weight)

    @staticmethod
    def backward(ctx, cotangent):
        x, weight = ctx.saved_tensors
        of_x = cotangent @ (weight if ctx.transposed else weight.T) if ctx.needs_input_grad[0] else None
        if torch.is_grad_enabled():  # the first pass, which builds the graph of the second
            return of_x, _LeftOutGradient.apply(cotangent, x, ctx.transposed), None
        rows, inputs = cotangent.flatten(0, -2), x.flatten(0, -2)
        return of_x, rows.T @ inputs if ctx.transposed else inputs.T @ rows, None


class _LeftOutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cotangent, x, transposed):
        ctx.save_for_backward(cotangent, x)
        ctx.transposed = transposed
        shape = (cotangent.shape[-1], x.shape[-1]) if transposed else (x.shape[-1], cotangent.shape[-1])
        return zeros(x, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, direction):
        cotangent, x = ctx.saved_tensors
        direction = direction if ctx.transposed else direction.T
        of_cotangent = x @ direction.T if ctx.needs_input_grad[0] else None
        return of_cotangent, cotangent @ direction if ctx.needs_input_grad[1] else None, None


def zeros(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Zeros of a shape, in the memory of one."""
    return like.new_zeros(()).expand(shape)
