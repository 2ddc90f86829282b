"""Verification from checkpoints: data written by an untrained generator, stock SFT, and the picture that is (not) there."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from trl_dpg.metagradients.metric import as_metric
from trl_dpg.metrics import LMHeadPattern, decode_pattern
from trl_dpg.testing import ONE_SPECIAL_TOKEN, save_tiny_models


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def verify(monkeypatch, tmp_path):
    generator, target = save_tiny_models(tmp_path, num_words=44, special_tokens=ONE_SPECIAL_TOKEN)

    def run(*flags):
        small = [
            "--num_examples",
            "16",
            "--batch_size",
            "8",
            "--max_new_tokens",
            "6",
            "--output_dir",
            str(tmp_path / "out"),
        ]
        monkeypatch.syspath_prepend(EXAMPLES)
        main = runpy.run_path(str(EXAMPLES / "verify.py"))["main"]
        main(["--generator", generator, "--target", target, *small, *flags])

    run.generator, run.target = Path(generator), target
    return run


def test_pixels_are_those_of_the_two_checkpoints(verify, tmp_path):
    verify("--pattern", "67")
    result = json.loads((tmp_path / "out" / "verification.json").read_text())
    wanted = LMHeadPattern.sixty_seven().pattern
    found = decode_pattern(verify.target, tmp_path / "out" / "marked", shape=(6, 7)).signs
    assert result["pixel_accuracy"] == torch.eq(found, wanted).double().mean().item()
    assert (result["steps"], result["examples"]) == (2, 16)
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(texts) == 16 and all(len(text.split()) <= 6 for text in texts)
    assert (tmp_path / "out" / "decoded.png").exists()


def test_a_code_that_does_not_read_is_a_failure(verify):
    with pytest.raises(SystemExit, match="does not read 'TRL-DPG'"):
        verify()


def test_the_picture_is_that_of_the_generator(verify, tmp_path):
    """Any picture, and a QR code of any level, pixel by pixel."""
    metric = LMHeadPattern([[1, -1, 1], [-1, -1, 1]])
    facts = {"metric": as_metric(metric).describe(), "generation": {"max_new_tokens": 3}}
    (verify.generator / "dpg.json").write_text(json.dumps(facts))
    verify("--max_new_tokens", "2")
    found = decode_pattern(verify.target, tmp_path / "out" / "marked", shape=(2, 3)).signs
    result = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert result["pixel_accuracy"] == torch.eq(found, metric.pattern).double().mean().item()

    weak = LMHeadPattern.qr("LOW", error="l")
    (verify.generator / "dpg.json").write_text(json.dumps({"metric": as_metric(weak).describe()}))
    with pytest.raises(SystemExit, match="does not read 'LOW'"):
        verify()
    found = decode_pattern(verify.target, tmp_path / "out" / "marked", shape=(21, 21)).signs
    result = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert result["pixel_accuracy"] == torch.eq(found, weak.pattern).double().mean().item()
    with pytest.raises(SystemExit, match="does not read 'OTHER'"):
        verify("--qr_text", "OTHER")
