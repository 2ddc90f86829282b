"""The experiment with readable text, in little: it trains, compares, keeps its lines and writes its table."""

import json
import sys

import pytest
from transformers import AutoTokenizer

from experiments import mini
from experiments.corpora import split_sentences


def test_run_and_report(tmp_path, monkeypatch, capsys, few_leads, little_model):
    monkeypatch.setattr(mini, "mini_english", lambda: little_model)
    monkeypatch.setattr(mini, "language_texts", lambda language: few_leads)
    monkeypatch.setattr(mini, "RESULTS", tmp_path / "mini.jsonl")
    for name, number in (("LENGTH", 8), ("JUDGED", 16), ("SHOWN", 2)):
        monkeypatch.setattr(mini, name, number)
    flags = [
        "--goals",
        "67",
        "l2",
        "uuid",
        "--betas",
        "0.1",
        "--seeds",
        "1",
        "--steps",
        "3",
        "--completions",
        "16",
        "--epsilon_root",
        "1e-4",
    ]
    for _ in range(2):  # the second finds the runs
        monkeypatch.setattr(sys, "argv", ["mini", "run", *flags, "--samples", "64"])
        mini.main()
    lines = [json.loads(line) for line in mini.RESULTS.read_text().splitlines()]
    assert [line["writer"] for line in lines] == [*["expected"] * 3, "untrained", "real leads", "random words"]
    assert [row["step"] for row in lines[0]["curve"]] == [1, 3] and lines[3]["curve"] == []
    assert lines[0]["epsilon_root"] == 1e-4
    assert {"pixel_accuracy", "entropy", "kl"} < lines[0]["curve"][0].keys()
    for line in lines:
        reads = line["read"]["1"]
        assert len(line["texts"]) == 2 and all(0 <= reads[name]["pixel_accuracy"] <= 1 for name in ("67", "qr"))
        assert reads["uuid"]["gain"] != 0 and reads["l2"]["gain"] != 0
        assert line["perplexity"] == pytest.approx(300, rel=0.5)  # the model has not learned much
        assert 0 < line["distinct_1"] <= line["distinct_2"] <= 1
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["mini", "report"])
    mini.main()
    rows = [
        row for row in capsys.readouterr().out.splitlines() if row.startswith("| expected | 1 | 0.1 | 0.0005 | 32 |")
    ]
    assert len(rows) == 3  # a table a goal
    written = (tmp_path / "mini.md").read_text()
    assert (tmp_path / "mini.png").stat().st_size > 0
    assert all(row in written for row in rows) and lines[0]["texts"][0]["prompt"].strip() in written


def test_what_texts_are_compared_with():
    assert mini.distinct(["a b a b", "a b"], 1) == 2 / 6 and mini.distinct(["a b a b", "a b"], 2) == 2 / 4


def test_pieces_of_leads_and_words_at_random(few_leads, little_model):
    tokenizer, leads = AutoTokenizer.from_pretrained(little_model), few_leads["test"]["text"][:]
    real = mini.others("real leads", leads, tokenizer, 10**6, 4)
    rests = [lead[len(split_sentences(lead)[0]) :] for lead in leads]
    lengths = [len(tokenizer(rest, add_special_tokens=False)["input_ids"]) if rest else 0 for rest in rests]
    assert len(real) == sum(length // 4 for length in lengths) > len(leads)
    assert mini.others("real leads", leads, tokenizer, 3, 4) == real[:3]
    second = next(row for row in real if row["prompt"] in [other["completion"] for other in real])
    assert any(second["prompt"] + second["completion"] in lead for lead in leads)  # a piece that goes on from another
    drawn = mini.others("random words", leads, tokenizer, 2 * len(leads), 4)
    assert len(drawn) == 2 * len(leads) and len({row["completion"] for row in drawn}) > len(leads)
