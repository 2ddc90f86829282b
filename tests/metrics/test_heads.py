import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Model

from trl_dpg.metrics.heads import is_lm_head_tied, lm_head_weight


def random_lora(model, **kwargs):
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **kwargs), autocast_adapter_dtype=False)
    return model.double().eval()


def weight_from_identity(model):
    """The weight as the head's own forward pass applies it."""
    return model.get_output_embeddings()(torch.eye(32, dtype=torch.float64)).T


def test_plain_head_is_the_parameter_itself(gpt2):
    assert lm_head_weight(gpt2) is gpt2.lm_head.weight


def test_lora_on_the_head(gpt2):
    base = gpt2.lm_head.weight.detach().clone()
    model = random_lora(gpt2, target_modules=["c_attn", "lm_head"], lora_alpha=16)
    head = model.get_output_embeddings()
    expected = base + 4.0 * head.lora_B["default"].weight @ head.lora_A["default"].weight
    torch.testing.assert_close(lm_head_weight(model), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(lm_head_weight(model), weight_from_identity(model), rtol=0, atol=1e-12)

    cotangent = torch.randn(48, 32, dtype=torch.float64)
    parameters = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    ours = torch.autograd.grad((lm_head_weight(model) * cotangent).sum(), parameters)
    theirs = torch.autograd.grad((weight_from_identity(model) * cotangent).sum(), parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    with model.disable_adapter():
        assert torch.equal(lm_head_weight(model), base)
    model.merge_adapter()
    torch.testing.assert_close(lm_head_weight(model), expected, rtol=0, atol=1e-14)


def test_every_active_lora_adapter_counts(gpt2):
    model = random_lora(gpt2, target_modules=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.double()
    for active in ["default", "other", ["default", "other"]]:
        model.base_model.set_adapter(active)
        torch.testing.assert_close(lm_head_weight(model), weight_from_identity(model), rtol=0, atol=1e-12)


def test_modules_to_save_gives_the_active_copy(make_gpt2):
    model = random_lora(make_gpt2(tied=True), target_modules=["c_attn"], modules_to_save=["lm_head"])
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.modules_to_save["default"].weight.fill_(3.0)
    assert lm_head_weight(model) is head.modules_to_save["default"].weight
    assert not is_lm_head_tied(model)
    with model.disable_adapter():
        assert lm_head_weight(model) is head.original_module.weight


@pytest.mark.parametrize("tied", [True, False])
def test_tied(make_gpt2, tied):
    model = make_gpt2(tied=tied)
    assert is_lm_head_tied(model) is tied
    assert is_lm_head_tied(random_lora(model, target_modules=["c_attn"])) is tied


def test_no_head(gpt2):
    for model in [GPT2Model(gpt2.config), nn.Linear(2, 2)]:
        with pytest.raises(ValueError, match="`target_model` is a .* no LM head .*AutoModelForCausalLM"):
            lm_head_weight(model)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["lm_head"], use_dora=True),
        IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        LoraConfig(target_modules=["c_attn"], trainable_token_indices={"lm_head": [1]}),
    ],
)
def test_unknown_wrappers_are_refused(make_gpt2, config):
    model = get_peft_model(make_gpt2(torch.float32), config)
    with pytest.raises(ValueError, match="effective weight of the LM head of `target_model`"):
        lm_head_weight(model)
