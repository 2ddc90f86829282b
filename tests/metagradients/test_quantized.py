"""Targets with 4-bit layers from bitsandbytes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.validation import validate


EXAMPLES = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [7, 8, 9]}, {"input_ids": [3, 4, 3, 4]}]
ARGS = TargetTrainingArguments(batch_size=2, learning_rate=1e-2, adam_epsilon_root=1e-6)


def metric(model):
    return -model(input_ids=torch.tensor([[1, 2, 3]])).logits.double().logsumexp(-1).mean()


@pytest.fixture
def load(tmp_path):
    """Loads the same tiny Llama in 4 bits, every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)


def with_adapters(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
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
