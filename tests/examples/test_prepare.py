"""What `python -m experiments.prepare` writes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import prepare as module
from experiments.corpora import language_texts, likelihood_texts, wikipedia_leads
from experiments.prepare import UUID, hex_tokenizer, main, prepare
from trl_dpg.testing import ONE_SPECIAL_TOKEN, WORDS, tiny_causal_lm, tiny_prompts


def prompts_of(path):
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


class TestHex:
    def test_tokenizer(self):
        tokenizer = hex_tokenizer()
        assert len(tokenizer) == 20
        assert tokenizer("")["input_ids"] == [17]
        uuid = "7f3c9a51e2d84b06a1c5f0e79d2b8364"
        input_ids = tokenizer(uuid)["input_ids"]
        assert input_ids == [17] + [int(digit, 16) for digit in uuid]
        assert tokenizer.decode(input_ids, skip_special_tokens=True) == uuid
        batch = tokenizer(["a", "abc"], padding=True)
        assert batch["input_ids"] == [[16, 16, 17, 10], [17, 10, 11, 12]]

    def test_models(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder = prepare("hex")
        hex_models = folder / "generator", folder / "target"
        for path, seed in zip(hex_models, [0, 1], strict=True):
            model = AutoModelForCausalLM.from_pretrained(path)
            expected = tiny_causal_lm(vocab_size=20, seed=seed)
            assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
            assert torch.equal(model.transformer.wpe.weight, 5 * expected.transformer.wpe.weight)
            assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (16, 17, 18)
            assert AutoTokenizer.from_pretrained(path)("0f")["input_ids"] == [17, 0, 15]

    def test_prompts(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder = prepare("hex")
        train, test = (prompts_of(folder / f"{name}.jsonl") for name in ("prompts", "held_out"))
        assert (len(train), len(test)) == (3072, 1024)
        assert len({*train, *test}) == 4096
        assert all(len(prompt) == 3 and int(prompt, 16) >= 0 for prompt in train)
        (row,) = map(json.loads, (folder / "uuid.jsonl").read_text().splitlines())
        assert row == {"prompt": "", "completion": UUID}


def test_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["tiny-44"])
    main(["tiny-44", "--seed", "1"])
    assert capsys.readouterr().out.splitlines() == ["Written: data/tiny-44", "Written: data/tiny-44-seed-1"]
    first, other = (tmp_path / "data" / name for name in ("tiny-44", "tiny-44-seed-1"))
    for folder, seed in ((first, 0), (other, 1)):
        for index, name in enumerate(("generator", "target")):
            expected = tiny_causal_lm(45, seed=2 * seed + index, special_tokens=ONE_SPECIAL_TOKEN)
            model = AutoModelForCausalLM.from_pretrained(folder / name)
            assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
        train, test = (prompts_of(folder / f"{name}.jsonl") for name in ("prompts", "held_out"))
        assert train == tiny_prompts(4096, 32, num_words=44)["train"]["prompt"][:] and not set(train) & set(test)
        texts = [json.loads(line)["text"].split() for line in (folder / "random.jsonl").read_text().splitlines()]
        assert {len(words) for words in texts} == {24} and {word for words in texts for word in words} == set(
            WORDS[:44]
        )
    with pytest.raises(SystemExit):
        main(["tiny-45"])
    assert "there is no 'tiny-45'" in capsys.readouterr().err


def test_wikipedia(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "smollm2", lambda: str(tmp_path / "model"))
    folder = prepare("wikipedia")
    assert (folder / "generator").resolve() == (folder / "target").resolve() == tmp_path / "model"
    wanted = [json.loads(line)["text"] for line in (folder / "metric.jsonl").read_text().splitlines()]
    leads = wikipedia_leads().shuffle(seed=0)[:8]["text"]
    assert wanted == [" ".join(text.split()[:30]) for text in leads]
    train, test = (
        {messages[0]["content"] for messages in prompts_of(folder / f"{name}.jsonl")}
        for name in ("prompts", "held_out")
    )
    assert len(test) == 16 and not train & test
    assert not any(text in prompt for text in wanted for prompt in train | test)


def test_mini(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "mini_english", lambda seed: str(tmp_path / "model"))
    folder = prepare("mini")
    assert (folder / "generator").resolve() == (folder / "target").resolve() == tmp_path / "model"
    train, test = (prompts_of(folder / f"{name}.jsonl") for name in ("prompts", "held_out"))
    assert len(test) == 64 and not set(train) & set(test)
    assert not any(text.startswith(tuple(test)) for text in language_texts("en")["train"]["text"][:])
    metric = [text for part in likelihood_texts("en", 32, 32).values() for text in part["text"]]
    assert not any(text.startswith(tuple(test + train)) for text in metric)
    real = [json.loads(line)["text"] for line in (folder / "real.jsonl").read_text().splitlines()]
    assert len(real) == len(language_texts("en")["test"]) - 64
    assert not any(text.startswith(tuple(metric)) for text in real)
