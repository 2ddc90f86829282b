r"""
DoRA's gradient is not the derivative of its loss: PEFT detaches the norms of the adapted weights, as DoRA's authors suggest.

Training uses that gradient, \\( g(\phi) = \partial_1 L(\phi, n(\phi)) \\) with norms \\( n \\), and so do the examples'
\\( \langle g_i, \lambda_g \rangle \\). But its derivative along \\( \lambda_g \\), and the metric's gradient, must see that norms
change with \\( \phi \\). Both are provided here; models without DoRA are not touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .forwards import replaced_forwards


class ThroughDetached(TorchFunctionMode):
    """`detach()` detaches nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


class DetachedOnce(TorchFunctionMode):
    """`detach()` cuts the first derivative, and [`~DetachedOnce.backward`] continues the second one behind the cut."""

    def __init__(self):
        super().__init__()
        self.pairs = list[tuple[Tensor, Tensor]]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is Tensor.detach and args[0].requires_grad:
            self.pairs.append((args[0], out.requires_grad_()))
        return out

    def backward(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: list[Tensor]) -> None:
        """Accumulates derivatives into `inputs`."""
        leaves = [leaf for _, leaf in self.pairs]
        torch.autograd.backward(outputs, cotangents, inputs=[*inputs, *leaves], retain_graph=bool(leaves))
        while self.pairs:  # from the last cut to the first, as one may lie behind another
            original, leaf = self.pairs.pop()
            leaves.pop()
            if leaf.grad is not None:
                torch.autograd.backward(original, leaf.grad, inputs=[*inputs, *leaves], retain_graph=True)


def has_dora(model: nn.Module) -> bool:
    """Whether the model has DoRA layers."""
    return any(isinstance(m, DoraLinearLayer) for m in model.modules())


@contextmanager
def dora_under(model: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """Runs the model's DoRA layers under a mode."""
    layers = [m for m in model.modules() if isinstance(m, DoraLinearLayer)]

    def under_mode(forward):
        def run(*args, **kwargs):
            with mode:
                return forward(*args, **kwargs)

        return run

    with replaced_forwards(layers, under_mode):
        yield
