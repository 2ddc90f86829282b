"""Tiny models, tokenizers and prompts of `trl_dpg.testing`."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dpg.testing import WORDS, build_once, save_tiny_models, tiny_causal_lm, tiny_prompts, tiny_tokenizer


class TestTinyTokenizer:
    def test_vocabulary(self):
        tokenizer = tiny_tokenizer()
        assert len(tokenizer) == 64
        assert len(set(WORDS)) == 60
        assert tokenizer.convert_ids_to_tokens([60, 61, 62, 63]) == ["<pad>", "<bos>", "<eos>", "<unk>"]
        special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
        assert special == ("<pad>", "<bos>", "<eos>", "<unk>")

    def test_round_trip(self):
        tokenizer = tiny_tokenizer()
        rng = random.Random(0)
        for length in [0, 1, 2, 24]:
            ids = rng.choices(range(4, 64), k=length)
            assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
        text = "the six seven"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_unknown_word_and_padding(self):
        tokenizer = tiny_tokenizer()
        assert tokenizer("the xylophone")["input_ids"][1] == tokenizer.unk_token_id
        batch = tokenizer(["sun", "the red sun"], padding=True)
        assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
        assert batch["attention_mask"][0] == [0, 0, 1]


class TestTinyCausalLM:
    def test_seed(self):
        state = torch.get_rng_state()
        first, again, other = tiny_causal_lm(seed=1), tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.lm_head.weight, again.lm_head.weight)
        assert not torch.equal(first.lm_head.weight, other.lm_head.weight)

    def test_config(self):
        model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
        for config in (model.config, model.generation_config):
            ids = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
            assert ids == (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert model.config.vocab_size == len(tokenizer)
        assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))

    @pytest.mark.parametrize("tie", [False, True])
    def test_tied(self, tie):
        model = tiny_causal_lm(tie_word_embeddings=tie)
        assert (model.lm_head.weight is model.transformer.wte.weight) is tie

    def test_size(self):
        model = tiny_causal_lm(vocab_size=40, hidden_size=16, num_layers=1, num_heads=4, max_position_embeddings=8)
        assert model.lm_head.weight.shape == (40, 16)
        assert model(torch.zeros(1, 8, dtype=torch.long)).logits.shape == (1, 8, 40)


class TestSaveTinyModels:
    def test_reload(self, tmp_path):
        generator, target = save_tiny_models(tmp_path)
        for path, seed in [(generator, 0), (target, 1)]:
            model = AutoModelForCausalLM.from_pretrained(path)
            expected = tiny_causal_lm(seed=seed).state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
            assert model.lm_head.weight is not model.transformer.wte.weight
            assert model.generation_config.eos_token_id == 62
            tokenizer = AutoTokenizer.from_pretrained(path)
            assert tokenizer("the six seven")["input_ids"] == tiny_tokenizer()("the six seven")["input_ids"]
            assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("left", 60, 62)

    def test_reuse(self, tmp_path):
        paths = save_tiny_models(tmp_path)
        other = save_tiny_models(tmp_path, seed=1)
        assert not set(paths) & set(other)
        made = [Path(path, "config.json").stat().st_mtime_ns for path in paths]
        assert save_tiny_models(tmp_path) == paths
        assert [Path(path, "config.json").stat().st_mtime_ns for path in paths] == made

    def test_interrupted(self, tmp_path):
        with pytest.raises(RuntimeError):
            save_tiny_models(tmp_path, seed=0.5)  # of which nothing can be made
        assert list(tmp_path.iterdir()) == []
        generator, _ = save_tiny_models(tmp_path)
        assert len(AutoTokenizer.from_pretrained(generator)) == 64

    def test_another_process_was_faster(self, tmp_path):
        def build(path):
            (tmp_path / "built").mkdir()
            (tmp_path / "built" / "theirs").touch()
            (path / "ours").touch()

        path = build_once(tmp_path / "built", build)
        assert [file.name for file in path.iterdir()] == ["theirs"]
        assert list(tmp_path.iterdir()) == [path]


def test_tiny_prompts():
    prompts = tiny_prompts(50, 20, seed=3)
    train, test = prompts["train"]["prompt"], prompts["test"]["prompt"]
    assert (len(train), len(test)) == (50, 20)
    assert len({*train, *test}) == 70
    assert all(len(prompt.split()) == 3 and set(prompt.split()) <= set(WORDS) for prompt in train)
    assert list(tiny_prompts(50, 20, seed=3)["test"]["prompt"]) == list(test)
    assert list(tiny_prompts(50, 20, seed=4)["test"]["prompt"]) != list(test)
