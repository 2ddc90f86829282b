r"""
The tanh approximation of GELU, with a second derivative in closed form.

GPT-2, Gemma and Phi use this activation. PyTorch composes its second derivative of elementwise operations. For GPT-2's
formula they are up to forty. Their intermediate results would take most of a small GPT-2's memory.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers.activations import NewGELUActivation

from ..runtime.model import replaced_forwards


SLOPE, CUBIC = math.sqrt(2 / math.pi), 0.044715


class TanhGELU(torch.autograd.Function):
    r"""\\( f(x) = \tfrac{1}{2} x (1 + \tanh z) \\) with \\( z = \sqrt{2 / \pi}\, (x + 0.044715\, x^3) \\)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.aten.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx, cotangent):
        return _Gradient.apply(cotangent, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """The cotangent times the first derivative, as a function that can be differentiated once more."""

    @staticmethod
    def forward(ctx, cotangent, x):
        ctx.save_for_backward(cotangent, x)
        return torch.ops.aten.gelu_backward(cotangent, x, approximate="tanh")

    @staticmethod
    @once_differentiable
    def backward(ctx, direction):
        cotangent, x = ctx.saved_tensors
        of_cotangent = torch.ops.aten.gelu_backward(direction, x, approximate="tanh")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # the formula overflows in half precision
        return of_cotangent, second_derivative(wide).mul_(cotangent).mul_(direction).to(x.dtype)


def second_derivative(x: Tensor) -> Tensor:
    r"""\\( f'' = (1 - \tanh^2 z) (z' + \tfrac{1}{2} x z'' - x z'^2 \tanh z) \\), elementwise."""
    square = x * x
    inner = square.mul(3 * SLOPE * CUBIC)  # a term of z', and equal to x z'' / 2
    slope = inner + SLOPE  # z'
    tanh = square.mul_(SLOPE * CUBIC).add_(SLOPE).mul_(x).tanh_()
    result = inner.add_(slope).sub_(slope.mul_(slope).mul_(x).mul_(tanh))
    return result.mul_(tanh.mul_(tanh).neg_().add_(1.0))


class _Replacement(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.gelu and kwargs == {"approximate": "tanh"}:
            return TanhGELU.apply(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def closed_form_gelus(model: nn.Module) -> Iterator[None]:
    """Makes a model compute the tanh approximation of GELU by [`TanhGELU`], whether it uses PyTorch's function or GPT-2's formula."""
    modules = [m for m in model.modules() if isinstance(m, NewGELUActivation)]
    with replaced_forwards(modules, lambda forward: TanhGELU.apply), _Replacement():
        yield
