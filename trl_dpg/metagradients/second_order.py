r"""
Double backward: kernels that have a second derivative, and graphs that leave out what a Hessian-vector product does not need.

A product by double backward differentiates \\( \langle g, \lambda \rangle \\), of which it does not need the value, and so not
\\( g \\) either. For a layer \\( y = x W^\top \\), that leaves out one of nine matrix products, and what would be the largest
tensor of the graph.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from .gelu import TanhGELU, closed_form_gelus
from .model import TargetModel, checkpointed_layers, is_compiled


@contextmanager
def twice_differentiable(model: TargetModel) -> Iterator[None]:
    """
    Runs a model by kernels that have a second derivative, and restores it on leaving.

    SDPA keeps its interface but takes the math kernel; any attention other than SDPA and eager becomes eager. A compiled model
    is run as it was before.
    """
    implementation = model.config._attn_implementation
    replaced = implementation not in (None, "eager", "sdpa")
    if replaced:
        model.set_attn_implementation("eager")
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext(),
        ):
            yield
    finally:
        if replaced:
            model.set_attn_implementation(implementation)


@contextmanager
def cheaper_second_order(model: nn.Module, bf16: bool = False) -> Iterator[None]:
    """
    Has forward passes of a model build second-order graphs that cost less.

    They hold zeros in place of the gradients of linear layers' weights, with the right derivatives. Only of weights that are
    parameters: the gradient of any other is a factor of what comes next. And [`TanhGELU`] stands for PyTorch's.

    Not under autocast, where a layer's own kernel does the rounding, nor with checkpoints: what is recomputed must be as it was
    computed.
    """
    with ExitStack() as stack:
        if not bf16 and not checkpointed_layers(model):
            stack.enter_context(closed_form_gelus(model))
            stack.enter_context(_Replacements())
        yield


def num_in_graph(model: nn.Module, params: Sequence[nn.Parameter], bf16: bool = False) -> int:
    """Elements of the gradients that a second-order graph of [`cheaper_second_order`] holds: all but linear layers' weights."""
    left_out: set[int] = set()
    if not bf16 and not checkpointed_layers(model):
        left_out = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    return sum(p.numel() for p in params if id(p) not in left_out)


class _Replacements(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not kwargs and func is F.linear and isinstance(args[1], nn.Parameter) and args[1].requires_grad:
            product = _Product.apply(args[0], args[1], True)
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if not kwargs and func is torch.addmm and isinstance(args[2], nn.Parameter) and args[2].requires_grad:
            return args[0] + _Product.apply(args[1], args[2], False)
        if func is F.gelu and kwargs == {"approximate": "tanh"}:
            return TanhGELU.apply(*args)
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
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
            return of_x, _WeightGradient.apply(cotangent, x, ctx.transposed), None
        rows, inputs = cotangent.flatten(0, -2), x.flatten(0, -2)
        return of_x, rows.T @ inputs if ctx.transposed else inputs.T @ rows, None


class _WeightGradient(torch.autograd.Function):
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
