import random
import re
import statistics

import pytest
from datasets import Dataset, load_dataset

from examples import data_valuation
from experiments import corpora, halves
from trl_dpg.testing import WORDS, tiny_causal_lm, tiny_tokenizer


DAMAGES = ["foreign", "misread", "repeated", "shuffled"]


@pytest.fixture
def leads(tmp_path, monkeypatch):
    """A tiny model, and texts with a rule: a word is followed by the next one in the list. "Foreign" ones have none."""
    rng = random.Random(0)
    starts = [rng.randrange(len(WORDS)) for _ in range(200)]
    ruled = [" ".join(WORDS[(start + i) % len(WORDS)] for i in range(16)) for start in starts]
    texts = {"en": ruled, "es": [" ".join(rng.choices(WORDS, k=16)) for _ in range(64)]}
    monkeypatch.setattr(corpora, "wikipedia_leads", lambda language="en": Dataset.from_dict({"text": texts[language]}))
    tiny_causal_lm(hidden_size=16, num_layers=1, max_position_embeddings=32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(data_valuation, "smollm2", lambda: str(tmp_path / "model"))
    return texts


def test_damage():
    rng = random.Random(0)
    text = "the red sun in the cold sky, a day at sea, and then the moon"
    assert corpora.damage(text, "clean", rng) == text
    shuffled = corpora.damage(text, "shuffled", rng)
    assert shuffled != text and sorted(shuffled.split()) == sorted(text.split())
    misread = corpora.damage(text, "misread", rng)
    changed = sum(a != b for a, b in zip(misread, text, strict=True))
    assert 0 < changed < len(text) / 3 and [c.isalpha() for c in misread] == [c.isalpha() for c in text]
    repeated = corpora.damage(text, "repeated", rng).split()
    assert len(repeated) == len(text.split()) and len(set(repeated)) == 5 and repeated[:6] == repeated[6:12]


def test_damaged_leads(leads):
    splits = corpora.damaged_leads(64, num_metric=10, num_test=20)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 64, "metric": 10, "test": 20}
    kinds = splits["train"]["kind"][:]
    assert {kind: kinds.count(kind) for kind in kinds} == {"clean": 32, **dict.fromkeys(DAMAGES, 8)}
    for row in splits["train"]:
        assert (row["text"] in leads["en"]) == (row["kind"] == "clean")
        assert (row["text"] in leads["es"]) == (row["kind"] == "foreign")
    assert corpora.damaged_leads(64, 10, 20)["train"].to_list() == splits["train"].to_list()
    assert corpora.damaged_leads(64, 10, 20, seed=1)["train"].to_list() != splits["train"].to_list()
    cut = corpora.damaged_leads(64, 10, 20, max_words=5)["train"]
    assert {len(text.split()) for text in cut["text"]} == {5}


def test_too_few_leads(leads):
    with pytest.raises(ValueError, match="[Ss]ample larger"):
        corpora.damaged_leads(64, 100, 100)


def test_auc():
    kinds = ["clean", "clean", "foreign", "foreign"]
    assert halves.auc([3, 2, 1, 0], kinds, ["foreign"]) == 1
    assert halves.auc([3, 2, 1, 0], ["foreign", "clean", "foreign", "clean"], ["foreign"]) == 0.25
    assert halves.auc([1, 1], ["clean", "foreign"], ["foreign"]) == 0.5


def test_damaged_texts_rank_lower(leads, tmp_path, capsys, monkeypatch):
    # all parameters: adapters of a random model this small learn too little
    monkeypatch.setattr(data_valuation, "LoraConfig", lambda **kwargs: None)
    data_valuation.main(
        str(tmp_path / "out"), num_examples=64, num_draws=2, num_runs=2, learning_rate=1e-2, batch_size=16
    )
    names = {"results.md", "scores.jsonl", "scores.parquet", "valuation.json", "index.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names

    rows = load_dataset("parquet", data_files=str(tmp_path / "out/scores.parquet"), split="train").to_list()
    values = [row["score"] for row in rows]
    assert values == sorted(values, reverse=True)
    kinds = [row["kind"] for row in rows]
    quality = halves.auc(values, kinds, DAMAGES)
    assert quality > 0.9
    share = statistics.fmean(kind == "clean" for kind in kinds[:32])
    assert share > 0.7

    results = (tmp_path / "out/results.md").read_text()
    assert results in capsys.readouterr().out
    table = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in results.splitlines() if " | " in line}
    gains = {name: float(row[3]) for name, row in table.items() if re.match(r"[+-]\d", row[3])}
    top, bottom = gains["top half by metagradient"], gains["bottom half by metagradient"]
    assert top > gains["random half"] > bottom
    assert len(gains) == 5 and float(table["no fine-tuning"][2]) < float(table["random half"][2].split(" ± ")[0])
    assert table["metagradient"][1:3] == [f"{share:.2f}", f"{quality:.2f}"]
    assert table["ranking"][3:] == [*(f"AUC, {kind}" for kind in DAMAGES[:-1]), f"AUC, {DAMAGES[-1]} |"]
