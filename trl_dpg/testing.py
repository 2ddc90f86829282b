"""Tiny models with a vocabulary of a few dozen words, and prompts for them, for tests and experiments without a network."""

import os
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


# They come last in the vocabulary, as in GPT-2. So the first tokens, which a pattern in the LM head uses, are words that the
# target is trained on.
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]

# The special tokens that a generator should have: then each of its tokens can be sampled and has a meaning. Suppressing the other
# tokens would not remove them from TRL's log-probabilities: the policy would drift towards them until it breaks down.
ONE_SPECIAL_TOKEN = ["<eos>"]

# fmt: off
WORDS = [
    "air", "and", "ant", "ask", "bad", "bag", "bed", "big", "bird", "blue", "boat", "book", "cat", "cold", "cup",
    "day", "dog", "door", "dry", "ear", "eat", "egg", "eye", "far", "fish", "fly", "food", "go", "good", "green",
    "hand", "hat", "hot", "in", "jump", "key", "leaf", "long", "moon", "new", "not", "old", "on", "rain", "red",
    "run", "sea", "see", "seven", "six", "sky", "small", "snow", "sun", "the", "to", "tree", "walk", "wind", "you",
]
# fmt: on


def tiny_tokenizer(num_words: int = 60, special_tokens: list[str] = SPECIAL_TOKENS) -> PreTrainedTokenizerFast:
    """
    Makes a tokenizer with a token for each of `num_words` words (English words, after the first 60 made-up ones), and then the special
    tokens. With `ONE_SPECIAL_TOKEN`, one token plays all special roles. The tokenizer adds no token to a text, and pads on the left.
    """
    words = [*WORDS, *(f"word{number}" for number in range(len(WORDS), num_words))]
    tokenizer = word_level_tokenizer(words[:num_words], special_tokens)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def word_level_tokenizer(tokens: list[str], special_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of these tokens and then the special tokens. It pads on the left. How it splits texts must still be set."""
    vocab = {token: index for index, token in enumerate(tokens + special_tokens)}
    pad, bos, eos, unk = (_role(name, special_tokens) for name in SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token=unk)),
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _role(name: str, special_tokens: list[str]) -> str:
    """The token for a special role: its own token, or the only special token."""
    return name if name in special_tokens else special_tokens[0]


def tiny_causal_lm(
    vocab_size: int = 64,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 2,
    max_position_embeddings: int = 64,
    seed: int = 0,
    tie_word_embeddings: bool = False,
    special_tokens: list[str] = SPECIAL_TOKENS,
) -> GPT2LMHeadModel:
    """
    Makes a GPT-2 without dropout, in float32 on the CPU, with random weights from a seed. It fits a [`tiny_tokenizer`] of `vocab_size`
    tokens with the same special tokens. The global random number generator is left as it was.
    """
    pad, bos, eos = (_role(name, special_tokens) for name in ("<pad>", "<bos>", "<eos>"))
    words = vocab_size - len(special_tokens)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=num_heads,
        n_positions=max_position_embeddings,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in one operation
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=words + special_tokens.index(pad),
        bos_token_id=words + special_tokens.index(bos),
        eos_token_id=words + special_tokens.index(eos),
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would also seed the GPUs.
        torch.default_generator.manual_seed(seed)
        return GPT2LMHeadModel(config)


def save_tiny_models(directory: str | os.PathLike[str], seed: int = 0, num_words: int = 60) -> tuple[str, str]:
    """
    Writes a generator and a target with different weights and the same tokenizer into `directory/words-{num_words}-seed-{seed}`.
    Returns the two directories. Existing models are kept.
    """
    build = partial(save_pair, tokenizer=tiny_tokenizer(num_words), special_tokens=SPECIAL_TOKENS, seed=seed)
    path = build_once(Path(directory) / f"words-{num_words}-seed-{seed}", build)
    return str(path / "generator"), str(path / "target")


def save_pair(
    folder: Path, tokenizer: PreTrainedTokenizerFast, special_tokens: list[str], seed: int, position_scale: float = 1.0
) -> None:
    """Writes the models `generator` and `target` for a tokenizer. `position_scale` multiplies their position embeddings."""
    for index, name in enumerate(["generator", "target"]):
        model = tiny_causal_lm(len(tokenizer), seed=2 * seed + index, special_tokens=special_tokens)
        model.transformer.wpe.weight.data *= position_scale
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def tiny_prompts(num_train: int, num_test: int, seed: int = 0, num_words: int = 60) -> DatasetDict:
    """Makes different prompts of three words of [`tiny_tokenizer`]: splits `train` and `test` with the column `prompt`."""
    base = min(num_words, len(WORDS))
    chosen = random.Random(seed).sample(range(base**3), num_train + num_test)
    prompts = [f"{WORDS[n // base**2]} {WORDS[n // base % base]} {WORDS[n % base]}" for n in chosen]
    return DatasetDict(
        train=Dataset.from_dict({"prompt": prompts[:num_train]}),
        test=Dataset.from_dict({"prompt": prompts[num_train:]}),
    )


def build_once(directory: Path, build: Callable[[Path], None]) -> Path:
    """Builds `directory` by `build`, unless it exists. It appears only when complete, since `build` writes to a temporary one."""
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            unfinished = Path(temporary) / directory.name
            unfinished.mkdir()
            build(unfinished)
            try:
                unfinished.rename(directory)
            except OSError:  # another process was faster
                if not directory.is_dir():
                    raise
    return directory
