"""The experiment with SmolLM2, in little: it trains, compares, keeps its lines and writes its table."""

import json
import sys
from functools import partial
from statistics import mean

from experiments import small
from experiments.corpora import likelihood_texts


def test_run_and_report(tmp_path, monkeypatch, capsys, few_leads, little_model):
    monkeypatch.setattr(small, "smollm2", lambda: little_model)
    monkeypatch.setattr(small, "language_texts", lambda language: few_leads)
    monkeypatch.setattr(small, "likelihood_texts", partial(likelihood_texts, max_words=4))
    monkeypatch.setattr(small, "RESULTS", tmp_path / "small.jsonl")
    for name, number in (("LENGTH", 8), ("NUM_HELD_OUT", 4), ("MICRO_BATCH", 4), ("DRAWS", 2), ("SHOWN", 2)):
        monkeypatch.setattr(small, name, number)
    flags = ["--goals", "67", "spanish", "--seeds", "1", "--steps", "3", "--completions", "8", "--samples", "8"]
    for _ in range(2):  # the second finds the runs
        monkeypatch.setattr(sys, "argv", ["small", "run", *flags])
        small.main()
    lines = [json.loads(line) for line in small.RESULTS.read_text().splitlines()]
    assert [(line["goal"], line["writer"]) for line in lines] == [
        *[("", "untrained"), ("", "real leads")],
        *[("67", "expected"), ("spanish", "expected")],
    ]
    for line in lines:
        first, second = line["read"]
        assert first.keys() == {"67", "l2", "uuid", "spanish", "other spanish"}
        assert first != second  # other texts each time
        assert all(read["gain"] != 0 for read in first.values())
        assert len(line["texts"]) == 2
    assert [row["step"] for row in lines[2]["curve"]] == [1, 3]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["small", "report"])
    small.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[2] for row in rows] == ["untrained", "real leads", "expected"] * 3
    first, spanish = lines[3]["curve"][0]["gain"], mean(draw["spanish"]["gain"] for draw in lines[3]["read"])
    assert (
        f"| Spanish texts | gain of the metric | expected | 1 | 0.1 | 1e-05 | 16 | 8 | 0.0001 | {first:.4f} | {spanish:.4f} |"
        in rows[5]
    )
    other = mean(draw["other spanish"]["gain"] for draw in lines[3]["read"])
    assert rows[8].startswith("| Spanish texts outside the metric |") and f"| {other:.4f} |" in rows[8]
    assert rows[5] in (tmp_path / "small.md").read_text()
    assert (tmp_path / "small.png").stat().st_size > 0
