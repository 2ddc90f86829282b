"""The tables and pictures of examples/results, from runs made up here."""

import json

import pytest
from PIL import Image

from examples import experiments


QR = ["1" * 21] * 21


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes what two seeds of the QR experiment would have left."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)

    def write(variant, seed, accuracy):
        folder = experiments.directory("tiny_qr", variant, seed)
        folder.mkdir(parents=True)
        ends = {"untrained": {"mean": 0.5}, "trained": {"mean": accuracy}}
        values = {f"eval_{name}": ends for name in ("pixel_accuracy", "qr_decoded", "metric", "distinct")}
        run = {"seed": seed, "target_steps": 1, "completions": 1024, "seconds": 60 + seed, "decoded": QR}
        run |= {"entropy": {"first": 3.3, "last": 2.2}, "hardware": "a machine"}
        (folder / "results.json").write_text(json.dumps(run | values))
        rows = [{"step": step, "eval_pixel_accuracy": accuracy * step / 20} for step in (0, 10, 20)]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("metagradient", 0, 1.0)
    write("metagradient", 1, 0.9)
    write("naive", 0, 0.55)
    return tmp_path


def test_report(results):
    experiments.report()
    text = (results / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| metagradient |")]
    assert len(rows) == 1
    assert "0, 1" in rows[0] and "0.95 (0.9 to 1)" in rows[0] and "3.30 → 2.20" in rows[0] and "1,024" in rows[0]
    assert "| naive |" in text and "(`tiny_67`)" not in text and "SGD" not in text
    for name in ("curves", "patterns"):
        assert f"(tiny_qr/{name}.png)" in text
        with Image.open(results / "tiny_qr" / f"{name}.png") as picture:
            assert min(picture.size) > 100


def test_finished_runs_are_not_repeated(results, monkeypatch):
    commands = []
    monkeypatch.setattr(experiments.subprocess, "run", lambda command, check: commands.append(command))
    experiments.main(["run", "tiny_qr", "--variants", "metagradient", "--seeds", "0", "2"])
    assert len(commands) == 1
    flags = commands[0]
    assert flags[flags.index("--seed") + 1] == "2"
    assert flags[flags.index("--results_dir") + 1] == str(results / "tiny_qr" / "metagradient" / "seed_2")


def test_every_experiment_has_its_configuration():
    for experiment in experiments.EXPERIMENTS.values():
        assert (experiments.EXAMPLES / "configs" / experiment.config).is_file()
