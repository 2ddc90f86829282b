"""Metagradients of the causal language models of Transformers, each against finite differences of its whole training run."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients


VOCAB = 17
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
MLP = {"intermediate_size": 16}
GROUPED = {**MLP, "num_key_value_heads": 1}  # grouped-query attention
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 4}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "head_dim": 8}
SSM = {"state_size": 4, "expand": 2, "time_step_rank": 2}
SSM2 = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}

# What a type of model needs beside SIZES.
ARCHITECTURES = {
    "bart": {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "init_std": 0.2},
    "bloom": {},
    "cohere": GROUPED,
    "falcon": {"ffn_hidden_size": 16, "multi_query": True, "alibi": False},
    "falcon_h1": {**GROUPED, **SSM2, "mamba_d_ssm": 32, "head_dim": 8},
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_inner": 16},
    "gpt_neo": {**MLP, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": MLP,
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "sliding_window": 4},
    "gptj": {"n_inner": 16, "rotary_dim": 4},
    "granite": GROUPED,
    "lfm2": {"block_ff_dim": 16, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
    "llama": GROUPED,
    "mamba": SSM,
    "mamba2": {"state_size": 4, "expand": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "mistral": {**GROUPED, "sliding_window": 4},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 16, "expansion_ratio": 1},
    "olmo2": GROUPED,
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16, "init_std": 0.2},
    "phi": MLP,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3": {**GROUPED, "head_dim": 8},
    "recurrent_gemma": {**GROUPED, "lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    "smollm3": GROUPED,
    "stablelm": GROUPED,
}  # fmt: skip
MODELS = {
    **{name: (name, {}) for name in ARCHITECTURES},
    **{f"{name}-tied": (name, {"tie_word_embeddings": True}) for name in ("gpt2", "llama", "mamba")},
    **{f"{name}-eager": (name, {"attn_implementation": "eager"}) for name in ("gpt2", "gemma3_text")},
}

ARGS = {"batch_size": 2, "learning_rate": 2e-3, "adam_epsilon_root": 1e-4, "weight_decay": 0.1}


class Float64(TorchFunctionMode):
    """
    Makes every rounding to float32 in a model's code one to float64.

    Most architectures round norms, rotary embeddings or softmax to float32, also in a float64 model: far too coarse for
    finite differences. Nothing else about the model's code changes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        exact = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*exact, **{k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()})


def make_model(name, dtype=torch.float64):
    architecture, overrides = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SIZES, **ARCHITECTURES[architecture], **overrides})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():  # off the points where biases are 0 and norms 1
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def make_examples():
    """Ragged examples, partly unsupervised, with weights other than 1: three batches, each seen once."""
    generator = torch.Generator().manual_seed(2)
    examples = []
    for i in range(6):
        ids = torch.randint(1, VOCAB, (4 + 2 * (i % 3),), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]] if i % 2 else list(ids)
        examples.append({"input_ids": ids, "labels": labels, "weight": 1.0 + 0.1 * (i - 2)})
    return examples


EXAMPLES = make_examples()
PROBE = torch.randint(1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))


def metric(model):
    """A metric with curvature that every parameter enters."""
    logits = model(input_ids=PROBE, use_cache=False).logits[:, :-1].double()
    return -(F.cross_entropy(logits.flatten(0, 1), PROBE[:, 1:].flatten()) ** 2)


def run(model, examples=EXAMPLES, **fields):
    return compute_metagradients(model, examples, metric, TargetTrainingArguments(**{**ARGS, **fields}))


@functools.cache
def exact(name):
    """Model and metagradients, in float64 throughout."""
    model = make_model(name)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped matrix products have no float64 kernel
    with Float64():
        return model, run(model).metagradients


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_finite_differences(name):
    """
    Along a random direction of the first batch's weights, whose metagradients come from forward mode alone, and along one of
    the other weights, whose come from double backward.
    """
    model, metagradients = exact(name)
    order = torch.cat([torch.as_tensor(batch) for batch in TargetTrainingArguments(**ARGS).batches(len(EXAMPLES))])
    direction = torch.randn(len(EXAMPLES), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = 1e-5
    for part in (order[:2], order[2:]):
        values = []
        for shift in (step, -step):
            shifted = [dict(e) for e in EXAMPLES]
            for i in part.tolist():
                shifted[i]["weight"] += shift * direction[i].item()
            with Float64():
                values.append(run(model, shifted).metric_after)
        expected = (values[0] - values[1]) / (2 * step)
        assert torch.dot(metagradients[part], direction[part]).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    """As it is used: in float32, with the attention and the experts that Transformers chooses."""
    single = run(make_model(name, torch.float32)).metagradients
    assert relative_error(single, exact(name)[1]) < 3e-5


@pytest.mark.parametrize("name", MODELS)
def test_central_difference(name):
    model, metagradients = exact(name)
    with Float64():
        out = run(model, curvature="central_difference")
    assert (len(out.curvature_errors), out.num_exact_fallbacks) == (3, 0)
    assert F.cosine_similarity(out.metagradients, metagradients, dim=0) > 0.9999
    assert relative_error(out.metagradients, metagradients) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name):
    """In float32: what is computed again in the backward pass, `Float64` does not reach."""
    out = run(make_model(name, torch.float32), gradient_checkpointing=True)
    assert relative_error(out.metagradients, exact(name)[1]) < 3e-5
