"""
Writes the files that configurations read, without the Hub. Under `data/` are two models, prompts, held-out prompts and texts of a metric.

    python -m experiments.prepare                   # data/tiny, for examples/configs/tiny_qr.yaml
    python -m experiments.prepare tiny-60 hex       # data/tiny-60 and data/hex
    python -m experiments.prepare tiny --seed 1     # data/tiny-seed-1: other random models

Each folder holds `generator`, `target`, `prompts.jsonl` and `held_out.jsonl`. An existing folder is kept.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

from datasets import DatasetDict, load_dataset
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from experiments.corpora import (
    continuation_prompts,
    language_texts,
    likelihood_texts,
    rephrase_prompts,
    smollm2,
    wikipedia_leads,
)
from experiments.pretrain import mini_english, tiny_multilingual
from trl_dpg.testing import (
    ONE_SPECIAL_TOKEN,
    SPECIAL_TOKENS,
    WORDS,
    build_once,
    save_pair,
    tiny_prompts,
    tiny_tokenizer,
    word_level_tokenizer,
)


HEX_DIGITS = "0123456789abcdef"
UUID = "7f3c9a51e2d84b06a1c5f0e79d2b8364"
METRIC_LEADS = 8  # the first ones, which no prompt contains


def words(folder: Path, seed: int, num_words: int) -> None:
    """Random models that know these words, prompts of three, and `random.jsonl`: texts of words at random, to compare with."""
    save_pair(folder, tiny_tokenizer(num_words, ONE_SPECIAL_TOKEN), ONE_SPECIAL_TOKEN, seed)
    save_prompts(folder, tiny_prompts(4096, 4096, num_words=num_words))
    draw = random.Random(0)
    save_rows(
        folder / "random.jsonl", [{"text": " ".join(draw.choices(WORDS[:num_words], k=24))} for _ in range(4096)]
    )


def hex_digits(folder: Path, seed: int) -> None:
    """
    Random models of hexadecimal digits, prompts of three digits, and `uuid.jsonl`: a UUID as the completion of an empty prompt.

    Position embeddings are five times as large. A digit should be learned by its position in the string. The digit before it does not tell
    which one follows, because it occurs several times.
    """
    save_pair(folder, hex_tokenizer(), SPECIAL_TOKENS, seed, position_scale=5.0)
    chosen = random.Random(0).sample(range(16**3), 4096)
    for name, part in (("prompts", chosen[:3072]), ("held_out", chosen[3072:])):
        save_rows(folder / f"{name}.jsonl", [{"prompt": f"{number:03x}"} for number in part])
    save_rows(folder / "uuid.jsonl", [{"prompt": "", "completion": UUID}])


def hex_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 16 digits, `<pad>`, `<bos>`, `<eos>` and `<unk>`. Every text begins after `<bos>`."""
    tokenizer = word_level_tokenizer(list(HEX_DIGITS), SPECIAL_TOKENS)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer, backend.decoder = Split("", "isolated"), Fuse()
    bos = [("<bos>", tokenizer.bos_token_id)]
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    return tokenizer


def multilingual(folder: Path, seed: int, languages: tuple[str, ...]) -> None:
    """A tiny model of several languages as both models (trained here in minutes, once), and first sentences as prompts."""
    link_models(folder, tiny_multilingual(languages))
    save_prompts(folder, continuation_prompts(language_texts("en")["test"], test_size=64))


def mini(folder: Path, seed: int) -> None:
    """
    A model that writes English as both models (trained here in a quarter of an hour, once), and first sentences to go on with.

    Also `real.jsonl`: leads that neither the model nor the metric `experiments.metrics:English` has.
    """
    leads = language_texts("en")["test"]
    link_models(folder, mini_english(seed))
    save_prompts(folder, continuation_prompts(leads, test_size=64))
    metric = tuple(text for part in likelihood_texts("en", 32, 32).values() for text in part["text"])
    save_rows(folder / "real.jsonl", [{"text": text} for text in leads["text"] if not text.startswith(metric)])


def wikipedia(folder: Path, seed: int, max_words: int, held_out: int) -> None:
    """SmolLM2-135M-Instruct as both models, leads to rephrase, `metric.jsonl`: other leads, and `uuid.jsonl`."""
    link_models(folder, smollm2())
    save_leads(folder, wikipedia_leads().shuffle(seed=0), max_words, held_out)


def wikipedia_of_hub(folder: Path, seed: int) -> None:
    """Prompts and texts like those of [`wikipedia`], but longer, from articles on the Hub. There are no models."""
    articles = load_dataset("wikimedia/wikipedia", "20231101.en", split="train[:100000]")
    leads = articles.map(lambda article: {"text": article["text"].split("\n\n")[0]}).select_columns(["title", "text"])
    save_leads(folder, leads.filter(lambda lead: len(lead["text"]) >= 200).shuffle(seed=0), max_words=80, held_out=256)


def save_leads(folder: Path, leads, max_words: int, held_out: int) -> None:
    texts = [" ".join(text.split()[:max_words]) for text in leads[:METRIC_LEADS]["text"]]
    save_rows(folder / "metric.jsonl", [{"text": text} for text in texts])
    save_rows(folder / "uuid.jsonl", [{"prompt": "", "completion": UUID}])
    save_prompts(
        folder, rephrase_prompts(leads.select(range(METRIC_LEADS, len(leads))), max_words, test_size=held_out)
    )


def save_prompts(folder: Path, prompts: DatasetDict) -> None:
    prompts["train"].to_json(folder / "prompts.jsonl")
    prompts["test"].to_json(folder / "held_out.jsonl")


def save_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def link_models(folder: Path, model: str) -> None:
    for name in ("generator", "target"):
        (folder / name).symlink_to(model)


KINDS = {
    "tiny": partial(words, num_words=100),
    "tiny-60": partial(words, num_words=60),
    "tiny-44": partial(words, num_words=44),
    "hex": hex_digits,
    "mini": mini,
    "multilingual": partial(multilingual, languages=("en", "es", "fr")),
    "multilingual-de-it": partial(multilingual, languages=("en", "de", "it")),
    "wikipedia": partial(wikipedia, max_words=30, held_out=16),
    "wikipedia-32": partial(wikipedia, max_words=30, held_out=32),
    "wikipedia-24": partial(wikipedia, max_words=24, held_out=64),
    "wikipedia-hub": wikipedia_of_hub,
}


def prepare(kind: str, seed: int = 0) -> Path:
    """The folder of a kind and a seed. It is written if it does not exist."""
    folder = Path("data") / (kind if seed == 0 else f"{kind}-seed-{seed}")
    return build_once(folder, lambda path: KINDS[kind](path, seed))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["tiny"], metavar="KIND", help=f"Of {', '.join(KINDS)}.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of random models.")
    options = parser.parse_args(argv)
    for kind in options.kinds:
        if kind not in KINDS:
            parser.error(f"there is no {kind!r}; there are {', '.join(KINDS)}")
        print(f"Written: {prepare(kind, options.seed)}")


if __name__ == "__main__":
    main()
