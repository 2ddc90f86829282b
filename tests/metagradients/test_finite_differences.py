"""Metagradients against float64 central differences of the whole training run."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TrainableTokensConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.metagradients.cases import (
    ADAMW,
    CASES,
    K1,
    K4,
    SGD,
    gpt2,
    make_examples,
    metric,
    relative_error,
    rope_model,
)
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, train_and_measure


def finite_differences(model, examples, args, step=1e-4, metric=metric):
    """Fourth-order central differences of the metric after the whole run."""
    out = []
    for i in range(len(examples)):
        values = {}
        for k in (-2, -1, 1, 2):
            shifted = [dict(e) for e in examples]
            shifted[i]["weight"] += k * step
            values[k] = train_and_measure(model, shifted, metric, args).metric_after
        out.append((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step))
    return torch.tensor(out, dtype=torch.float64)


def fitted_differences(model, examples, args, step=5e-3, points=6, degree=5):
    """Slope at 0 of a polynomial through many points, which averages out the float32 rounding inside a model."""
    out = []
    for i in range(len(examples)):
        shifts = [k * step for k in range(-points, points + 1)]
        values = []
        for shift in shifts:
            shifted = [dict(e) for e in examples]
            shifted[i]["weight"] += shift
            values.append(train_and_measure(model, shifted, metric, args).metric_after)
        out.append(np.polynomial.Polynomial.fit(shifts, values, degree).deriv()(0.0))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_gpt2(name):
    make_model, fields = CASES[name]
    model, examples, args = make_model(), make_examples(), TargetTrainingArguments(**fields)
    out = compute_metagradients(model, examples, metric, args)
    assert relative_error(out.metagradients, finite_differences(model, examples, args)) < 1e-5


@pytest.mark.parametrize("steps", [K1, K4], ids=["k1", "k4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_metric_that_reads_the_lm_head_alone(tied, steps):
    """At the last step, such a metric moves no other parameter."""

    def metric(model):
        return -model.lm_head.weight.pow(4).sum()

    model, examples, args = gpt2(tied), make_examples(), TargetTrainingArguments(**ADAMW, **steps)
    out = compute_metagradients(model, examples, metric, args)
    assert relative_error(out.metagradients, finite_differences(model, examples, args, metric=metric)) < 1e-5


TOKENS = {"token_indices": [1, 5], "target_modules": ["wte"]}
ADAPTERS = {
    "lora-and-tokens": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[1, 5]),
    "tokens": TrainableTokensConfig(**TOKENS),
    "lora-and-embedding": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("steps", [K1, K4], ids=["k1", "k4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_beside_the_layers(name, tied, steps):
    """
    Of embeddings, which PEFT wraps, and of what comes before the text. Tied, the wrappers of embedding and head share a
    module: its parameters are the same objects after a call, and trained in the next.
    """
    model = get_peft_model(gpt2(tied), ADAPTERS[name]).double()
    params = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    for p in params:
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    examples, args = make_examples(), TargetTrainingArguments(**ADAMW, **steps)
    out = compute_metagradients(model, examples, metric, args)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in params]
    assert relative_error(out.metagradients, finite_differences(model, examples, args)) < 1e-5


@pytest.mark.parametrize("fields", [{**ADAMW, **K4}, {**SGD, **K4}], ids=["adamw", "sgd"])
@pytest.mark.parametrize(
    "classes", [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)], ids=["llama", "qwen2"]
)
def test_rope_models(classes, fields):
    """These round to float32 inside (normalization, softmax), also in a float64 model."""
    model, examples, args = rope_model(*classes), make_examples(n=4), TargetTrainingArguments(**fields)
    out = compute_metagradients(model, examples, metric, args)
    assert relative_error(out.metagradients, fitted_differences(model, examples, args)) < 1e-4


@pytest.mark.parametrize("epsilon_root", [1e-9, 1e-6, "auto"])
@pytest.mark.parametrize("steps", [1, 4], ids=["k1", "k4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_float32_against_float64(tied, steps, epsilon_root):
    """
    At epsilon_root = 1e-9 elements with |g| < 3e-5 dominate the metagradient, and float32's error of such a g does too:
    single models then lie between 8e-6 and 1.2e-4, so the median of three is tested.
    """
    generator = torch.Generator().manual_seed(5)
    examples = [{"input_ids": torch.randint(64, (16,), generator=generator).tolist()} for _ in range(64)]
    args = TargetTrainingArguments(batch_size=64 // steps, learning_rate=1e-3, adam_epsilon_root=epsilon_root)
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        single = compute_metagradients(model, examples, metric, args)
        double = compute_metagradients(model.double(), examples, metric, args)
        errors.append(relative_error(single.metagradients, double.metagradients.double()))
    assert sorted(errors)[1] < 1e-4
    if epsilon_root != 1e-9:
        assert max(errors) < 1e-4
