"""Models whose metagradients would be silently wrong are refused by name, and left as they were."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients


SIZES = {
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BART = {
    "vocab_size": 17,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 16,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
HRM = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
XLNET = {"vocab_size": 17, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
REFUSED = {
    "encoder-decoder": (AutoModelForSeq2SeqLM, "bart", BART, "BartForConditionalGeneration.*encoder-decoder"),
    "t5": (
        AutoModelForSeq2SeqLM,
        "t5",
        {
            "vocab_size": 17,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "T5ForConditionalGeneration.*encoder-decoder",
    ),
    "bidirectional": (AutoModelForCausalLM, "bert", SIZES, "BertLMHeadModel.*later tokens"),
    "xlnet": (AutoModelForCausalLM, "xlnet", XLNET, "XLNetLMHeadModel.*later tokens"),
    "own-gradient": (AutoModelForCausalLM, "hrm_text", HRM, "HrmTextForCausalLM.*not the derivative of its loss"),
    "changes-itself": (
        AutoModelForCausalLM,
        "rwkv",
        {**SIZES, "attention_hidden_size": 16, "rescale_every": 1},
        "RwkvForCausalLM.*changes its own parameters.*rescale_every",
    ),
}
EXAMPLES = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11, 12]}]
PROBE = torch.tensor([[1, 2, 3, 4, 5]])


def metric(model):
    logits = model(input_ids=PROBE, use_cache=False).logits[:, :-1].double()
    return -(F.cross_entropy(logits.flatten(0, 1), PROBE[:, 1:].flatten()) ** 2)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, steps):
    auto, architecture, fields, message = REFUSED[name]
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(architecture, **fields))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = TargetTrainingArguments(batch_size=3, num_train_epochs=steps, learning_rate=1e-3, adam_epsilon_root=1e-4)
    with pytest.raises(ValueError, match=message):
        compute_metagradients(model, EXAMPLES, metric, args)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
