"""The experiment with a condition, in little: it trains, keeps its lines and prints its table."""

import json
import sys

import pytest

from experiments import condition


def test_run_and_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(condition, "RESULTS", tmp_path / "condition.jsonl")
    for name, number in (("NUM_CLEAN", 4), ("NUM_HELD_OUT", 8), ("VALIDATED", 16)):
        monkeypatch.setattr(condition, name, number)
    flags = ["--weights", "1000", "--seeds", "0", "--steps", "1", "--every", "1", "--completions", "16"]
    for _ in range(2):  # the second finds the run
        monkeypatch.setattr(sys, "argv", ["condition", "run", *flags])
        condition.main()
    (line,) = map(json.loads, condition.RESULTS.read_text().splitlines())
    assert set(line["curve"][0]) == {"step", "pixel_accuracy", "qr_decoded", "perplexity", "held_out"}
    assert line["curve"][0]["perplexity"] == pytest.approx(1, abs=0.05)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["condition", "report"])
    condition.main()
    assert "| weight 1000, limit +0.5% | 0.004 | 16 | 0 |" in capsys.readouterr().out
