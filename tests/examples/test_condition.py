"""The experiment with a condition, in little: it trains, keeps its lines and prints its table."""

import json
import sys

import pytest
import torch

from experiments import common, condition
from trl_dpg.metrics import Perplexity


def test_clean_texts():
    texts = condition.clean_texts(200, seed=0)
    following = {}
    for row in texts:
        words = row["text"].split()
        assert len(words) == condition.LENGTH
        for word, then in zip(words, words[1:], strict=False):
            following.setdefault(word, set()).add(then)
    assert max(map(len, following.values())) == condition.SUCCESSORS
    assert texts == condition.clean_texts(200, seed=0) and texts[:5] != condition.clean_texts(5, seed=1)


@pytest.mark.slow
def test_pretrained_target_knows_the_language():
    tokenizer = common.tokenizer()
    target = condition.pretrained_target(0, condition.PRETRAINING_STEPS)
    with torch.no_grad():
        assert 4 < Perplexity(condition.clean_texts(32, seed=-1), tokenizer)(target).item() < 4.5


def test_run_and_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(condition, "RESULTS", tmp_path / "condition.jsonl")
    monkeypatch.setattr(condition, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(condition, "NUM_CLEAN", 4)
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
    assert "| weight 1000, limit +0.5% | 0.0015 | 16 | 0 |" in capsys.readouterr().out
