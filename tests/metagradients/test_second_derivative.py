"""Operations that are not PyTorch's, some of whose gradients have a derivative and some only seem to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, train_and_measure
from trl_dpg.metagradients.runtime.second_derivative import foreign_operations
from trl_dpg.testing import tiny_causal_lm


class Silu(torch.autograd.Function):
    """SiLU, as all of the following. Its gradient is made of PyTorch's operations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * slope(x)


def slope(x):
    return torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))


class InPlace(Silu):
    """As a Triton kernel does: autograd sees neither the computation nor that something was written."""

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        result = cotangent.detach() * slope(x.detach())
        x.data.copy_(result)
        return x


class Detached(Silu):
    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent.detach() * slope(x.detach())


class ConstantSlope(Silu):
    """The gradient is computed in the forward pass, as in fused losses. It is linear in its cotangent, and constant in `x`."""

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * slope(x.detach())


class Once(Silu):
    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * slope(x)


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x) if self.function is not None else F.silu(x)


EXAMPLES = [{"input_ids": [(3 * i + 7 * j) % 60 for j in range(6)]} for i in range(8)]


def model_with(function):
    model = tiny_causal_lm(hidden_size=16, num_layers=2)
    for block in model.transformer.h:
        for layer in (block.mlp.c_fc, block.mlp.c_proj):
            layer.weight.data *= 5
        block.mlp.act = Activation(function)
    return model


def metric(model):
    return -model(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss


def run(function, num_steps=2, **kwargs):
    args = TargetTrainingArguments(
        learning_rate=1e-3, batch_size=8 // num_steps, adam_epsilon_root=1e-6, disable_tqdm=True, **kwargs
    )
    return compute_metagradients(model_with(function), EXAMPLES, metric, args).metagradients


@pytest.mark.parametrize("num_steps", [1, 2])
def test_sound_operations_are_as_pytorchs(num_steps):
    torch.testing.assert_close(run(Silu, num_steps), run(None, num_steps), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("function", "bf16"), [(InPlace, False), (InPlace, True), (Detached, False), (ConstantSlope, False), (Once, False)]
)
def test_operations_without_a_second_derivative_are_refused(function, bf16):
    with pytest.raises(ValueError, match=f"`curvature='exact'` .*: it runs {function.__name__}, .*use_liger_kernel"):
        run(function, bf16=bf16)


@pytest.mark.parametrize("function", [InPlace, Detached, ConstantSlope])
def test_what_is_refused_would_be_silently_wrong(function, monkeypatch):
    monkeypatch.setattr("trl_dpg.metagradients.method.exact.check_second_derivatives", lambda *args: None)
    right = run(None)
    assert (run(function) - right).norm() > 0.01 * right.norm()


@pytest.mark.parametrize("function", [InPlace, Detached, Once])
def test_one_step_is_checked_too(function):
    with pytest.raises(ValueError, match=f"it runs {function.__name__}"):
        run(function, num_steps=1)


def test_one_step_needs_no_derivative_of_the_gradient():
    torch.testing.assert_close(run(ConstantSlope, num_steps=1), run(None, num_steps=1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("function", [InPlace, Detached, ConstantSlope, Once])
def test_central_differences_take_any_operation(function):
    right = run(None)
    found = run(function, curvature="central_difference", curvature_tolerance=0.1)
    assert (found - right).norm() < 0.01 * right.norm()


def test_operations_are_named():
    ids = torch.tensor([[1, 2, 3]])
    assert foreign_operations(model_with(None)(ids).logits.sum()) == []
    assert foreign_operations(model_with(InPlace)(ids).logits.sum()) == ["InPlace"]


def test_a_model_is_looked_at_once(monkeypatch):
    looked = []
    monkeypatch.setattr(
        "trl_dpg.metagradients.runtime.second_derivative.foreign_operations", lambda loss: looked.append(loss) or []
    )
    model = model_with(None)
    args = TargetTrainingArguments(learning_rate=1e-3, adam_epsilon_root=1e-6)
    for _ in range(3):
        compute_metagradients(model, EXAMPLES, metric, args)
    train_and_measure(model, EXAMPLES, metric, args)
    assert len(looked) == 1
