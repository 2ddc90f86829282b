"""Two rounds of the alternation, and what it refuses."""

import json

import pytest

from experiments import closed_loop
from experiments.prepare import prepare
from experiments.tables import CONFIGS


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*flags):
        small = ["--max_steps", "1", "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "16"]
        small += ["--max_completion_length", "6", "--num_eval_prompts", "4", "--logging_steps", "1"]
        config = ["--config", str(CONFIGS / "tiny_l2.yaml"), "--use_cpu", "true"]
        monkeypatch.chdir(tmp_path)
        prepare("tiny-60")
        closed_loop.main([*config, *small, "--output_dir", "there", *flags])

    return run


def test_two_rounds(run, tmp_path):
    run("--rounds", "2", "--sft_steps", "2")
    rows = json.loads((tmp_path / "there" / "results.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[0]["loop"] == rows[0]["control"]
    norms = [row["loop"]["lm_head_norm"] for row in rows]
    assert len(set(norms)) == 3  # the target keeps what it learned
    assert rows[2]["loop"] != rows[2]["control"]
    assert {"results.md", "rounds.png"} <= {path.name for path in (tmp_path / "there").iterdir()}


def test_real_texts(run, tmp_path):
    texts = tmp_path / "real.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("red green", "blue red")))
    run("--rounds", "1", "--sft_steps", "2", "--real_texts", str(texts))
    first, last = json.loads((tmp_path / "there" / "results.json").read_text())["rounds"]
    assert first["real"] == first["loop"]
    assert len({last[who]["lm_head_norm"] for who in ("loop", "control", "real")}) == 3


def test_patterns_are_refused(run):
    with pytest.raises(ValueError, match="a change since the last round"):
        run("--metric", "qr")
