"""Targets with 4-bit and 8-bit layers from bitsandbytes, and adapters of every kind."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, train_and_measure
from trl_dpg.metagradients.kernels import switched
from trl_dpg.validation import validate


EXAMPLES = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [7, 8, 9]}, {"input_ids": [3, 4, 3, 4]}]
ARGS = TargetTrainingArguments(batch_size=2, learning_rate=1e-2, adam_epsilon_root=1e-6)


def metric(model):
    return -model(input_ids=torch.tensor([[1, 2, 3]])).logits.double().logsumexp(-1).mean()


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
CENTRAL = replace(ARGS, curvature="central_difference")


@pytest.fixture
def load(tmp_path):
    """Loads the same tiny Llama, in 4 bits unless told otherwise, every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    def load(quantization=NF4):
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)

    return load


def with_adapters(model, **kwargs):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **kwargs))
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    return model


def test_nothing_to_train(load):
    with pytest.raises(ValueError, match="no trainable parameter.*quantized.*`target_peft_config=LoraConfig"):
        compute_metagradients(load().requires_grad_(False), EXAMPLES, metric, ARGS)


def test_adapters_on_4_bits_equal_adapters_on_the_dequantized_model(load):
    quantized, dense = with_adapters(load()), with_adapters(load().dequantize())
    expected = compute_metagradients(dense, EXAMPLES, metric, ARGS)
    out = compute_metagradients(quantized, EXAMPLES, metric, ARGS)
    scale = expected.metagradients.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(out.metagradients, expected.metagradients, rtol=0, atol=1e-3 * scale)
    after = validate(quantized, EXAMPLES, metric, ARGS)["metric"]
    assert after == pytest.approx(validate(dense, EXAMPLES, metric, ARGS)["metric"], rel=1e-6)
    assert after != out.metric_before


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def test_central_differences_on_4_bits(load):
    exact = compute_metagradients(with_adapters(load()), EXAMPLES, metric, ARGS)
    args = replace(CENTRAL, curvature_tolerance=0.1)
    central = compute_metagradients(with_adapters(load()), EXAMPLES, metric, args)
    assert cosine(central.metagradients, exact.metagradients) > 0.9999
    assert central.num_exact_fallbacks == 0


@pytest.mark.parametrize("args", [ARGS, CENTRAL], ids=["exact", "central"])
def test_8_bits(load, args):
    """
    The kernel rounds activations to 8 bits and hands gradients through, so its derivatives are near those of the
    dequantized model, no more.
    """
    quantized, dense = with_adapters(load(INT8)), with_adapters(load(INT8).dequantize())
    expected = compute_metagradients(dense, EXAMPLES, metric, ARGS)
    with warnings.catch_warnings(action="ignore"):
        out = compute_metagradients(quantized, EXAMPLES, metric, args)
    assert cosine(out.metagradients, expected.metagradients) > 0.99


ADAPTERS = {
    "plain": {},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rslora-bias": {"use_rslora": True, "bias": "lora_only"},
}


def with_gpt2_adapters(name, **fields):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=8, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **ADAPTERS[name], **fields)
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    for param in model.parameters():
        if param.requires_grad:
            param.data += torch.randn(param.shape) * 0.2
    return model.double()


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_against_finite_differences(name, num_steps, optim):
    model = with_gpt2_adapters(name)
    args = replace(ARGS, optim=optim, batch_size=3, num_train_epochs=num_steps, adam_epsilon_root=1e-4)
    out = compute_metagradients(model, EXAMPLES, metric, args)
    for i, value in enumerate(out.metagradients.tolist()):
        moved = []
        for shift in (-1e-4, 1e-4):
            examples = [dict(e) for e in EXAMPLES]
            examples[i]["weight"] = 1 + shift
            moved.append(train_and_measure(model, examples, metric, args).metric_after)
        assert value == pytest.approx((moved[1] - moved[0]) / 2e-4, rel=1e-5, abs=1e-7)

    central = compute_metagradients(model, EXAMPLES, metric, replace(args, curvature="central_difference"))
    assert cosine(central.metagradients, out.metagradients) > 0.999999
    assert central.num_exact_fallbacks == 0


def test_dora_is_refused():
    """Its gradient is not the derivative of its loss."""
    with pytest.raises(ValueError, match="`use_dora=False`"):
        compute_metagradients(with_gpt2_adapters("plain", use_dora=True), EXAMPLES, metric, ARGS)


def test_a_forward_of_the_instance_stays():
    """Accelerate's hooks replace it there; checkpoints do so for a while."""
    model = with_gpt2_adapters("plain")
    layers = model.base_model.model.transformer.h
    layers[0].forward = hook = layers[0].forward
    args = replace(ARGS, gradient_checkpointing=True, curvature="central_difference")
    compute_metagradients(model, EXAMPLES, metric, args)
    assert vars(layers[0])["forward"] is hook and "forward" not in vars(layers[1])


def test_frozen_half_precision():
    """The loss is computed in float32, chunked or not; central differences are refused."""
    model = with_gpt2_adapters("plain").float()
    for param in model.parameters():
        if not param.requires_grad:
            param.data = param.data.bfloat16()
    whole = compute_metagradients(model, EXAMPLES, metric, ARGS)
    with switched(logits_at_once=0):
        chunked = compute_metagradients(model, EXAMPLES, metric, ARGS)
    assert whole.losses == pytest.approx(chunked.losses, rel=1e-2)
    assert all(loss != torch.tensor(loss).bfloat16().item() for loss in chunked.losses)
    with pytest.raises(ValueError, match="needs float32, but `.*` of `model` is in torch.bfloat16"):
        compute_metagradients(model, EXAMPLES, metric, CENTRAL)
