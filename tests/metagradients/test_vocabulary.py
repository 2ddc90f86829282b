"""Cross-entropy in chunks against ordinary autograd: values, gradients, second derivatives and forward mode."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.metagradients.cases import CASES, make_examples, metric, relative_error
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.kernels import switched
from trl_dpg.metagradients.kernels.chunked_head import has_plain_head, token_losses


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"{rows} rows")
def chunks(request):
    """Logits of so many tokens at once, and whole ones never."""
    with switched(logits_at_once=0, chunk=5 * request.param):
        yield


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.tensor([0, 4, 2, 2, 1, 3, 0])


def test_against_cross_entropy(chunks):
    hidden, weight, labels = inputs()
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(token_losses(hidden, weight, labels[:, None])[:, 0], expected)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(hidden, weight, labels[:, None])[:, 0], expected)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_derivatives(chunks, trained):
    """First and second derivatives against finite differences, also where one factor is frozen."""
    hidden, weight, labels = inputs()
    targets = torch.stack([labels, labels.roll(1), labels.roll(2)], dim=1)
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    function = lambda h, w: token_losses(h, 1 * w, targets)  # noqa: E731  of a parameter, its gradient is not computed
    assert torch.autograd.gradcheck(function, (hidden, weight))
    assert torch.autograd.gradgradcheck(function, (hidden, weight))


@pytest.mark.parametrize("name", ["adamw-k1", "adamw-k4", "tied-adamw-k4", "sgd-k4", "lora-adamw", "example"])
def test_metagradients(chunks, name):
    """The same with chunks and without, and the LM head is left out of the forward pass."""
    make_model, fields = CASES[name]
    model, args = make_model(), TargetTrainingArguments(**fields)
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(1))
    chunked = compute_metagradients(model, make_examples(), metric, args)
    in_chunks = len(calls)
    with switched(logits_at_once=math.inf):
        whole = compute_metagradients(make_model(), make_examples(), metric, args)
    assert relative_error(chunked.metagradients, whole.metagradients.double()) < 1e-6
    assert chunked.losses == pytest.approx(whole.losses, rel=1e-12)
    assert in_chunks <= 6  # causality, the try-out (2), the metric before and after (2), no training step


class WithoutPrefix(GPT2LMHeadModel):
    """As custom code may be: nothing says where the model without its head is."""

    base_model_prefix = ""

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head


def test_model_without_a_base_model_prefix(chunks):
    """It is its own decoder, so it is left whole, with the same results as one that says it."""
    plain = CASES["adamw-k4"][0]()
    model = WithoutPrefix(plain.config).double()
    model.load_state_dict(plain.state_dict())
    assert not has_plain_head(model)
    args = TargetTrainingArguments(**CASES["adamw-k4"][1])
    out, expected = (compute_metagradients(m, make_examples(), metric, args).metagradients for m in (model, plain))
    assert relative_error(out, expected.double()) < 1e-6


SIZES = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.3, "pad_token_id": 0,
         "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("model_class", "config", "plain"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES), True),
        (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), True),
        (GPT2LMHeadModel, GPT2Config(vocab_size=13, n_embd=8, n_head=2, n_layer=1, n_positions=16), True),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.0), False),
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=3.0), False),
    ],
    ids=["llama", "llama-tied", "gpt2", "softcapping", "scaling"],
)
def test_models_that_change_their_logits_are_left_whole(chunks, model_class, config, plain):
    torch.manual_seed(0)
    model = model_class(config).eval()
    assert has_plain_head(model) == plain
    examples = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7]}]
    args = TargetTrainingArguments(batch_size=1, adam_epsilon_root="auto", learning_rate=1e-4)
    actual = compute_metagradients(model, examples, lambda m: -m.get_input_embeddings().weight.norm(), args)
    with switched(logits_at_once=math.inf):
        expected = compute_metagradients(model, examples, lambda m: -m.get_input_embeddings().weight.norm(), args)
    assert relative_error(actual.metagradients, expected.metagradients.double()) < 1e-4


def test_compiled_models_are_left_whole():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=8, n_head=2, n_layer=1, n_positions=16)).eval()
    assert has_plain_head(model)
    model.compile(backend="eager")
    assert not has_plain_head(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_precision_whatever_the_path(dtype):
    """Adapters on a frozen base in half precision: few logits and many are rounded alike, so micro-batches change nothing."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) * 0.2
    examples = [{"input_ids": [1 + i, 2, 3 + i, 4, 5]} for i in range(6)]
    results = []
    for whole, size in itertools.product((0, math.inf), (None, 1)):
        args = TargetTrainingArguments(batch_size=3, micro_batch_size=size, adam_epsilon_root=1e-6, learning_rate=1e-3)
        with switched(logits_at_once=whole):
            out = compute_metagradients(model, examples, lambda m: -m.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.norm(), args)  # fmt: skip
        results.append(out.metagradients.double())
    for result in results[1:]:
        assert relative_error(result, results[0]) < 1e-4
