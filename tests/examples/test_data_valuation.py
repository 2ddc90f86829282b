import csv
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.resources import WORDS, tiny_causal_lm, tiny_tokenizer


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # the script imports its neighbor
import data_valuation  # noqa: E402
from data_valuation import DAMAGES, LABELS, ValuationArguments  # noqa: E402


@pytest.fixture
def args(tmp_path):
    return ValuationArguments(
        output_dir=str(tmp_path / "results"),
        num_examples=64,
        metric_examples=16,
        test_examples=16,
        max_length=16,
        batch_size=8,
        learning_rate=3e-3,
        num_runs=2,
    )


@pytest.fixture
def texts():
    """Texts with a rule, that a word is followed by the next one in the list, and others without."""
    rng = random.Random(0)
    starts = [rng.randrange(len(WORDS)) for _ in range(96)]
    ruled = [" ".join(WORDS[(start + i) % len(WORDS)] for i in range(16)) for start in starts]
    return ruled, [" ".join(rng.choices(WORDS, k=16)) for _ in range(64)]


def test_damage():
    rng = random.Random(0)
    text = "the red sun in the cold sky, a day at sea, and then the moon"
    assert data_valuation.damage(text, "clean", rng) == text
    shuffled = data_valuation.damage(text, "shuffled", rng)
    assert shuffled != text and sorted(shuffled.split()) == sorted(text.split())
    misread = data_valuation.damage(text, "misread", rng)
    changed = sum(a != b for a, b in zip(misread, text, strict=True))
    assert 0 < changed < len(text) / 3 and [c.isalpha() for c in misread] == [c.isalpha() for c in text]
    repeated = data_valuation.damage(text, "repeated", rng).split()
    assert len(repeated) == len(text.split()) and len(set(repeated)) == 5 and repeated[:6] == repeated[6:12]


def test_examples(args, texts):
    clean, foreign = texts
    examples = data_valuation.make_examples(clean[:64], foreign, args, tiny_tokenizer())
    kinds = [example["kind"] for example in examples]
    assert {kind: kinds.count(kind) for kind in kinds} == {"clean": 32, **dict.fromkeys(DAMAGES, 8)}
    for example in examples:
        assert example["input_ids"] == tiny_tokenizer()(example["text"])["input_ids"]
        assert (example["text"] in clean) == (example["kind"] == "clean")
        assert (example["text"] in foreign) == (example["kind"] == "foreign")
    assert data_valuation.make_examples(clean[:64], foreign, args, tiny_tokenizer()) == examples
    args.seed = 1
    assert data_valuation.make_examples(clean[:64], foreign, args, tiny_tokenizer()) != examples


def test_auc():
    assert data_valuation.auc([3, 2, 1, 0], [True, True, False, False]) == 1
    assert data_valuation.auc([3, 2, 1, 0], [False, True, False, True]) == 0.25
    assert data_valuation.auc([1, 1], [True, False]) == 0.5


def test_damaged_texts_rank_lower(args, texts, tmp_path):
    model = tiny_causal_lm(hidden_size=16, num_layers=1, max_position_embeddings=16)
    report = data_valuation.run(model, tiny_tokenizer(), *texts, args)
    output_dir = tmp_path / "results"
    assert {path.name for path in output_dir.iterdir()} == {"results.md", "scores.csv", "valuation.png"}

    with open(output_dir / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["metagradient"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [int(row["rank"]) for row in rows] == list(range(1, 65))
    quality = data_valuation.ranking_quality(scores, [row["kind"] for row in rows])
    assert quality["AUC"] > 0.9
    assert quality["clean in upper half"] > 0.7

    assert (output_dir / "results.md").read_text() == report
    table = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in report.splitlines() if " | " in line}
    gains = {name: float(table[label][3]) for name, label in LABELS.items()}
    assert gains["none"] == 0
    assert gains["top"] > gains["random"] > gains["bottom"]
    assert f"{quality['AUC']:.2f}" in table["metagradient"]

    with Image.open(output_dir / "valuation.png") as picture:
        assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 2


def test_too_few_leads(args, texts):
    with pytest.raises(ValueError, match="[Ss]ample larger"):
        data_valuation.run(tiny_causal_lm(), tiny_tokenizer(), texts[0][:10], texts[1], args)
