"""
Trains small models from scratch, on real text. With them, experiments run in minutes on a CPU. `python -m experiments.prepare` calls
this module.

[`mini_english`] writes sentences of an encyclopedia. [`tiny_multilingual`] writes several languages. At the end of each sentence, a
document of several languages may go on in another one, with a small chance. So after a sentence in English, the model nearly always
writes English, and now and then another language. Without such samples, reinforcement would have nothing to start from. The first
call trains each model, and keeps it.
"""

import os
import random
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from experiments.corpora import cached, language_texts, split_sentences


# 2.3M parameters and 5.1M tokens, of which a lead of Wikipedia has 160: a quarter of an hour on an idle core
MINI = {"hidden_size": 192, "num_layers": 4, "num_steps": 5000, "batch_size": 8, "learning_rate": 3e-3, "bf16": True}


def mini_english(seed: int = 0, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """The directory of a model that writes English sentences. The first call trains it, in a quarter of an hour on a CPU core."""
    return _pretrained(f"mini-en-seed-{seed}", ["en"], cache_dir, switch=0.0, seed=seed, **MINI)


def tiny_multilingual(
    languages: Sequence[str] = ("en", "es", "fr"), seed: int = 0, cache_dir: str | os.PathLike[str] | None = None
) -> str:
    """The directory of a tiny model of several languages. The first call trains the model, in minutes on a CPU core."""
    return _pretrained(f"tiny-{'-'.join(languages)}-seed-{seed}", languages, cache_dir, seed=seed)


def _pretrained(name: str, languages: Sequence[str], cache_dir: str | os.PathLike[str] | None, **settings: Any) -> str:
    def build(path: Path) -> None:
        texts = {language: language_texts(language)["train"]["text"] for language in languages}
        model, tokenizer = pretrain(texts, **settings)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return cached(name, build, cache_dir)


def pretrain(
    texts: dict[str, list[str]],
    switch: float = 0.02,
    num_steps: int = 2500,
    batch_size: int = 16,
    length: int = 128,
    learning_rate: float = 6e-3,
    hidden_size: int = 128,
    num_layers: int = 3,
    vocab_size: int = 2048,
    bf16: bool = False,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """
    Trains a tokenizer and a model from scratch, on texts of each language.

    `switch` is the chance of another language at the end of a sentence, `length` the tokens of a sequence, `learning_rate` the peak.
    `bf16` is a third faster on CPUs that have such instructions.
    """
    tokenizer = train_tokenizer([text for sample in texts.values() for text in sample[:1000]], vocab_size)
    documents = mixed_documents(texts, switch, seed)
    tokens = chain.from_iterable([*tokenizer(document)["input_ids"], tokenizer.eos_token_id] for document in documents)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which would also seed the GPUs.
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
    start_time = time.perf_counter()
    for step in range(1, num_steps + 1):
        input_ids = torch.tensor(list(islice(tokens, batch_size * length))).view(batch_size, length)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.2f}, {time.perf_counter() - start_time:.0f} seconds", flush=True)
    return model, tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer that puts `<bos>` before every text.

    A space is added before a text that does not begin with one. So a first word has the same token as anywhere else.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def mixed_documents(texts: dict[str, list[str]], switch: float, seed: int) -> Iterator[str]:
    """An endless stream of texts, equally many of each language. Some go on in another language after a sentence."""
    rng = random.Random(seed)
    sentences = {language: [split_sentences(text) for text in texts[language]] for language in texts}
    # A text of a single sentence would teach the model to answer a prompt of one sentence with nothing.
    sentences = {language: [text for text in split if len(text) > 1] for language, split in sentences.items()}
    while True:
        language = rng.choice(list(texts))
        rest = rng.choice(sentences[language])
        document = []
        while rest:
            document.append(rest[0])
            rest = rest[1:]
            if rest and rng.random() < switch:
                language = rng.choice([other for other in texts if other != language])
                rest = rng.choice(sentences[language])[1:]
        yield " ".join(document)
