import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789- ."


def _make_gpt2(dtype=torch.float64, tied=False, vocab_size=48):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def _make_llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def _make_tokenizer(**special_tokens):
    """One token per character: 0 is <unk>, 1 is <s>, 2 is </s>."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special_tokens)


def _move(model, size, seed=0):
    """Shift every trainable parameter by a random amount of the given size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def _assert_gradient(metric, model, epsilon=1e-6, rtol=1e-7):
    """Compare the gradient along a random direction with central differences."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(metric(model), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * epsilon * direction
            values.append(metric(model))
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= sign * epsilon * direction
    assert slope != 0
    torch.testing.assert_close((values[0] - values[1]) / (2 * epsilon), slope.double(), rtol=rtol, atol=0)


@pytest.fixture
def make_gpt2():
    return _make_gpt2


@pytest.fixture
def make_tokenizer():
    return _make_tokenizer


@pytest.fixture
def move():
    return _move


@pytest.fixture
def assert_gradient():
    return _assert_gradient


@pytest.fixture
def gpt2():
    return _make_gpt2()


@pytest.fixture
def llama():
    return _make_llama()


@pytest.fixture
def tokenizer():
    return _make_tokenizer(bos_token="<s>", eos_token="</s>")
