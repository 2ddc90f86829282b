"""Cheaper second derivatives against plain double backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.kernels import building_graph
from trl_dpg.metagradients.kernels.gelu import TanhGELU


def linear(x, weight, bias):
    return F.linear(x, weight, bias)


def conv1d(x, weight, bias):
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight.T.contiguous()).view(*x.shape[:-1], -1)


def transposed(x, weight, bias):
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("layer", [linear, conv1d, transposed])
def test_product(layer):
    """With one weight used twice, and another that is not a parameter but made of one."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 4, generator=generator).double()) for _ in range(2)]
    params.append(nn.Parameter(torch.randn(4, generator=generator).double()))
    x = torch.randn(2, 3, 4, generator=generator).double()
    directions = [torch.randn(p.shape, generator=generator).double() for p in params]

    def product():
        w, u, b = params
        hidden = torch.tanh(layer(torch.tanh(layer(x, w, b)), w, b))
        loss = layer(layer(hidden, u, b), torch.exp(u), b).square().sum()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return grads[0], torch.autograd.grad(grads, params, directions)

    grad, expected = product()
    with building_graph(nn.Module(), bf16=False):
        zeros, actual = product()
    torch.testing.assert_close(actual, expected)
    assert grad.any() and (layer is conv1d or not zeros.any())


def second_derivatives(function, dtype):
    """Value, gradient and second derivatives, from far left to far right."""
    x = torch.linspace(-12, 12, 2001).to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(x.shape, generator=generator).to(dtype).requires_grad_()
    direction = torch.randn(x.shape, generator=generator).to(dtype)
    value = function(x)
    (grad,) = torch.autograd.grad(value, x, cotangent, create_graph=True)
    return [value.detach(), grad.detach(), *torch.autograd.grad(grad, [x, cotangent], direction)]


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_gelu(name, dtype, tolerance):
    """Float32, here too, against float64: PyTorch's own derivatives of the first formula are as far from it."""
    actual = second_derivatives(TanhGELU.apply, dtype)
    expected = second_derivatives(ACT2FN[name], torch.float64)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_in_half_precision(dtype):
    """Where a frozen part is: no value is too large for the formula, as long as the activation is not."""
    x = torch.linspace(-1e4, 1e4, 2001).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(TanhGELU.apply(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.dtype == dtype and second.isfinite().all()


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh"])
def test_gelu_of_a_model(name):
    """It is used, and the model's modules are as before."""
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, activation_function=name)
    model = GPT2LMHeadModel(config)
    with building_graph(model, bf16=False):
        out = model.transformer.h[0].mlp.act(torch.ones(3, requires_grad=True))
    assert "TanhGELU" in type(out.grad_fn).__name__
    assert "forward" not in vars(model.transformer.h[0].mlp.act)
    out = model.transformer.h[0].mlp.act(torch.ones(3, requires_grad=True))
    assert "TanhGELU" not in type(out.grad_fn).__name__


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2), GPT2LMHeadModel),
        (LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2), LlamaForCausalLM),
        (GemmaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4), GemmaForCausalLM),
    ],
    ids=["gpt2", "llama", "gemma"],
)  # fmt: skip
def test_checkpointing(config, architecture):
    """What is recomputed is what was computed, of layers of every kind."""
    torch.manual_seed(0)
    model = architecture(config).double()
    examples = [{"input_ids": [1 + i, 2, 3, 4 + i, 5]} for i in range(6)]
    args = {"batch_size": 2, "learning_rate": 1e-3, "adam_epsilon_root": "auto"}
    expected, actual = (
        compute_metagradients(
            model,
            examples,
            lambda model: -model.lm_head.weight.norm(),
            TargetTrainingArguments(**args, gradient_checkpointing=checkpointing),
        ).metagradients
        for checkpointing in (False, True)
    )
    assert expected.any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
