"""Forward mode against double backward, and models that only have the latter."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import GPT2Config, GPT2LMHeadModel

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients


EXAMPLES = [{"input_ids": [1, 2, 3, 4, 5][: 2 + i % 4]} for i in range(6)]


class Cube(torch.autograd.Function):
    """An activation with a backward, but without a forward-mode derivative, as kernels of quantized layers are."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class SmoothCube(nn.Module):
    def forward(self, x):
        return x**3


class OpaqueCube(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


def make_model(tied=False, activation=None):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tied, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    if activation is not None:
        for block in model.transformer.h:
            block.mlp.act = activation
    return model


def metric(model):
    return -(model(input_ids=torch.tensor([[1, 2, 3]])).logits.logsumexp(-1) ** 2).mean()


@pytest.mark.parametrize("tied", [False, True])
def test_first_step_by_forward_mode_equals_double_backward(tied):
    """An activation without a forward-mode derivative, but the same values, has the first step go by double backward."""
    args = TargetTrainingArguments(batch_size=6, micro_batch_size=4)
    forward_mode = compute_metagradients(make_model(tied, SmoothCube()), EXAMPLES, metric, args).metagradients
    double_backward = compute_metagradients(make_model(tied, OpaqueCube()), EXAMPLES, metric, args).metagradients
    torch.testing.assert_close(forward_mode, double_backward, rtol=1e-6, atol=0)
    assert forward_mode.abs().min() > 0


def test_model_without_forward_mode_derivative():
    args = TargetTrainingArguments(batch_size=3, adam_epsilon_root=1e-6)
    opaque = compute_metagradients(make_model(activation=OpaqueCube()), EXAMPLES, metric, args).metagradients
    smooth = compute_metagradients(make_model(activation=SmoothCube()), EXAMPLES, metric, args).metagradients
    torch.testing.assert_close(opaque, smooth, rtol=1e-6, atol=0)
    assert smooth.abs().min() > 0


def test_first_step_builds_no_graph():
    """At K = 1 there are two backward passes, those of training and of the metric: the memory is that of ordinary training."""
    model, passes = make_model(), []
    model.transformer.ln_f.weight.register_hook(lambda grad: passes.append(grad.requires_grad))
    compute_metagradients(model, EXAMPLES, metric, TargetTrainingArguments(batch_size=6))
    assert passes == [False, False]


def lm_head_norm(model):
    return -model.lm_head.weight.norm()


def test_other_layers_are_left_out_for_a_metric_of_the_lm_head():
    """No tangents go through them at K = 1. The result is the same if they are frozen."""
    model, tangents = make_model(), []
    model.transformer.register_forward_hook(
        lambda module, args, output: tangents.append(forward_ad.unpack_dual(output.last_hidden_state).tangent)
    )
    model.lm_head.register_forward_pre_hook(
        lambda module, args: tangents.append(forward_ad.unpack_dual(module.weight).tangent is not None)
    )
    args = TargetTrainingArguments(batch_size=6, adam_epsilon_root=1e-6)
    whole = compute_metagradients(model, EXAMPLES, lm_head_norm, args).metagradients
    assert tangents[-2:] == [None, True]
    model.requires_grad_(False).lm_head.requires_grad_(True)
    alone = compute_metagradients(model, EXAMPLES, lm_head_norm, args).metagradients
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=0)
    assert whole.abs().min() > 0


@pytest.mark.parametrize("activation", [SmoothCube(), OpaqueCube()], ids=["forward_mode", "double_backward"])
def test_step_at_a_learning_rate_of_zero(activation):
    """Its direction is zero, as are its metagradients."""
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "weight_decay": 0.0}
    args = TargetTrainingArguments(optim="sgd", batch_size=3, **schedule)
    out = compute_metagradients(make_model(activation=activation), EXAMPLES, metric, args)
    assert (out.metagradients == 0).sum() == 3


def test_last_step_builds_no_graph_of_gradients_for_a_metric_of_the_lm_head():
    """Other layers are passed once in training, and once on the way back through the last of two steps."""
    model, passes = make_model(), []
    model.transformer.ln_f.weight.register_hook(lambda grad: passes.append(grad.requires_grad))
    compute_metagradients(model, EXAMPLES, lm_head_norm, TargetTrainingArguments(batch_size=3))
    assert passes == [False] * 3


def test_metric_of_a_parameter_that_no_loss_reaches():
    model = make_model()
    model.alone = nn.Parameter(torch.ones(3, dtype=torch.float64))
    args = TargetTrainingArguments(batch_size=3, adam_epsilon_root=1e-6)
    assert not compute_metagradients(model, EXAMPLES, lambda model: -model.alone.norm(), args).metagradients.any()
