"""Metagradients against float64 central differences of the whole training run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, TrainableTokensConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients


VOCAB = 17


def gpt2(tied=False):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1, attn_pdrop=0.1,
        tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def rope_model(config_class, model_class):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return model_class(config).double()


def lora(model):
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():  # off the point where B = 0
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    return model


def make_examples(n=6, seed=2):
    """Ragged examples, partly unsupervised, with weights other than 1."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(n):
        length = 4 + 2 * (i % 3)
        ids = torch.randint(VOCAB, (length,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]] if i % 2 else list(ids)
        examples.append({"input_ids": ids, "labels": labels, "weight": 1.0 + 0.1 * (i - 2)})
    return examples


PROBE = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))


def metric(model):
    """A metric with curvature that every parameter enters."""
    logits = model(input_ids=PROBE).logits[:, :-1].double()  # transformers' own loss would round to float32
    return -(F.cross_entropy(logits.flatten(0, 1), PROBE[:, 1:].flatten()) ** 2)


def finite_differences(model, examples, args, step=1e-4):
    """Fourth-order central differences of the metric after the whole run."""
    out = []
    for i in range(len(examples)):
        values = {}
        for k in (-2, -1, 1, 2):
            shifted = [dict(e) for e in examples]
            shifted[i]["weight"] += k * step
            values[k] = compute_metagradients(model, shifted, metric, args).metric_after
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
            values.append(compute_metagradients(model, shifted, metric, args).metric_after)
        out.append(np.polynomial.Polynomial.fit(shifts, values, degree).deriv()(0.0))
    return torch.tensor(out, dtype=torch.float64)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


ADAMW = {"optim": "adamw", "learning_rate": 1e-2, "adam_epsilon_root": 1e-4, "weight_decay": 0.1}
SGD = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}
K1 = {"batch_size": 6}
K4 = {"batch_size": 3, "num_train_epochs": 2}
CASES = {
    "adamw-k1": (gpt2, {**ADAMW, **K1}),
    "adamw-k4": (gpt2, {**ADAMW, **K4}),
    "adamw-k4-paper-eps": (gpt2, {**ADAMW, **K4, "adam_epsilon_root": 1e-9, "learning_rate": 1e-3}),
    "adamw-uneven": (gpt2, {**ADAMW, "batch_size": 4}),
    "adamw-k9": (gpt2, {**ADAMW, "batch_size": 2, "num_train_epochs": 3}),
    "sgd-k1": (gpt2, {**SGD, **K1}),
    "sgd-k4": (gpt2, {**SGD, **K4}),
    "tied-adamw-k1": (lambda: gpt2(tied=True), {**ADAMW, **K1}),
    "tied-adamw-k4": (lambda: gpt2(tied=True), {**ADAMW, **K4}),
    "tied-sgd-k4": (lambda: gpt2(tied=True), {**SGD, **K4}),
    "example": (gpt2, {**ADAMW, **K4, "loss_normalization": "example"}),
    "max-length": (gpt2, {**ADAMW, **K4, "loss_normalization": "max_length", "max_length": 6}),
    "clipping-adamw": (gpt2, {**ADAMW, **K4, "max_grad_norm": 0.1}),
    "clipping-sgd": (gpt2, {**SGD, **K4, "max_grad_norm": 0.1}),
    "linear-warmup": (gpt2, {**ADAMW, **K4, "lr_scheduler_type": "linear", "warmup_steps": 2}),
    "cosine-warmup": (gpt2, {**ADAMW, **K4, "lr_scheduler_type": "cosine", "warmup_steps": 0.5}),
    "no-decay-on-norms": (gpt2, {**ADAMW, **K4, "weight_decay_on_norm_and_bias": False}),
    "micro-batches": (gpt2, {**ADAMW, **K4, "micro_batch_size": 2}),
    "lora-adamw": (lambda: lora(gpt2()), {**ADAMW, **K4}),
    "lora-sgd": (lambda: lora(gpt2(tied=True)), {**SGD, **K4}),
}


@pytest.mark.parametrize("name", CASES)
def test_gpt2(name):
    make_model, fields = CASES[name]
    model, examples, args = make_model(), make_examples(), TargetTrainingArguments(**fields)
    out = compute_metagradients(model, examples, metric, args)
    assert relative_error(out.metagradients, finite_differences(model, examples, args)) < 1e-5


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
