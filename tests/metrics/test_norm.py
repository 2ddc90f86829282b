import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_dpg.metrics import LMHeadNorm


def test_value(gpt2):
    expected = np.sqrt((gpt2.lm_head.weight.detach().numpy() ** 2).sum())
    value = LMHeadNorm()(gpt2)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(-expected, rel=1e-14)
    assert LMHeadNorm().readouts(gpt2) == {"lm_head_norm": pytest.approx(expected, rel=1e-14)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_accumulation(make_gpt2, dtype):
    model = make_gpt2(dtype)
    expected = np.sqrt((model.lm_head.weight.detach().double().numpy() ** 2).sum())
    value = LMHeadNorm()(model)
    assert value.item() == pytest.approx(-expected, rel=1e-14)
    (gradient,) = torch.autograd.grad(value, [model.lm_head.weight])
    assert gradient.dtype == dtype


def test_gradient(gpt2, llama, assert_gradient):
    for model in [gpt2, llama]:
        assert_gradient(LMHeadNorm(), model)


def test_gradient_of_lora(gpt2, assert_gradient):
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    assert_gradient(LMHeadNorm(), get_peft_model(gpt2, config).double())
