from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import pretrain as module
from experiments.corpora import split_sentences, wikipedia_leads
from experiments.pretrain import mini_english, mixed_documents, pretrain, tiny_multilingual, train_tokenizer


SMALL = {"num_steps": 3, "batch_size": 2, "length": 16, "hidden_size": 16, "num_layers": 1, "vocab_size": 300}


@pytest.fixture(scope="module")
def texts():
    return {language: wikipedia_leads(language)["text"][:40] for language in ("en", "es")}


def test_tokenizer(texts, tmp_path):
    train_tokenizer(texts["es"], 400).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 400
    for text in ["", " Él nació en 1990.", " ¿Qué? 漢字"]:
        input_ids = tokenizer(text)["input_ids"]
        assert input_ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in input_ids
        assert tokenizer.decode(input_ids, skip_special_tokens=True) == text
    assert tokenizer("El año")["input_ids"] == tokenizer(" El año")["input_ids"]
    assert tokenizer(["a", "El año"], padding=True)["attention_mask"][0][0] == 0


def test_documents():
    texts = {name: [f"{name}{i} A. {name}{i} B. {name}{i} C." for i in range(5)] + ["One."] for name in ("X", "Y")}
    assert all(document in texts["X"] + texts["Y"] for document in islice(mixed_documents(texts, 0.0, seed=0), 50))
    documents = list(islice(mixed_documents(texts, 0.2, seed=0), 2000))
    assert documents == list(islice(mixed_documents(texts, 0.2, seed=0), 2000))
    assert documents != list(islice(mixed_documents(texts, 0.2, seed=1), 2000))
    assert "One." not in documents
    assert abs(sum(document.startswith("X") for document in documents) / 2000 - 0.5) < 0.05
    first_boundary = [sentences[0][0] != sentences[1][0] for sentences in map(split_sentences, documents)]
    assert abs(sum(first_boundary) / 2000 - 0.2) < 0.04


def test_pretrain(texts):
    state = torch.get_rng_state()
    model, tokenizer = pretrain(texts, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    again, _ = pretrain(texts, **SMALL)
    other, _ = pretrain(texts, **SMALL, seed=1)
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight and weight.shape == (300, 16)
    assert torch.equal(weight, again.lm_head.weight) and not torch.equal(weight, other.lm_head.weight)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_learning(texts):
    losses = []
    for num_steps in (1, 60):
        model, tokenizer = pretrain(texts, **{**SMALL, "num_steps": num_steps})
        batch = tokenizer(texts["es"][:8], return_tensors="pt", truncation=True, max_length=16)
        losses.append(model(**batch, labels=batch["input_ids"]).loss.item())
    assert losses[1] < losses[0] - 0.3


def test_a_model_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pretrain", lambda texts, seed: pretrain(texts, **{**SMALL, "seed": seed}))
    path = tiny_multilingual(("en", "es"), seed=1, cache_dir=tmp_path)
    assert path == str(tmp_path / "tiny-en-es-seed-1")
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == len(AutoTokenizer.from_pretrained(path))

    made = Path(path, "config.json").stat().st_mtime_ns
    monkeypatch.setenv("TRL_DPG_CACHE", str(tmp_path))
    assert tiny_multilingual(("en", "es"), seed=1) == path
    assert Path(path, "config.json").stat().st_mtime_ns == made


def test_a_model_of_english(tmp_path, monkeypatch):
    """The settings of `mini`, but for fewer steps."""
    monkeypatch.setitem(module.MINI, "num_steps", 1)
    path = mini_english(seed=1, cache_dir=tmp_path)
    assert path == str(tmp_path / "mini-en-seed-1")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert 2.2e6 < model.num_parameters() < 2.4e6 and model.dtype == torch.float32
