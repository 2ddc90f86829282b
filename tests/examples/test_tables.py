"""The tables and pictures of experiments/results, from runs made up here."""

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments import tables
from experiments.prepare import KINDS
from trl_dpg.scripts import train


QR = ["1" * 21] * 21


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes what two seeds of the QR experiment would have left."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def write(variant, seed, accuracy):
        folder = tables.directory("tiny_qr", variant, seed)
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
    tables.report()
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
    commands, collected = [], []
    monkeypatch.setattr(tables.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(tables, "collect", lambda *args: collected.append(args[:2]))
    monkeypatch.chdir(results)
    tables.main(["run", "tiny_qr", "--variants", "metagradient", "--seeds", "0", "2"])
    assert len(commands) == 1
    flags = commands[0]
    assert flags[flags.index("--seed") + 1] == "2"
    assert flags[flags.index("--model_name_or_path") + 1] == "data/tiny-44-seed-2/generator"
    assert (results / "data" / "tiny-44-seed-2" / "generator" / "config.json").exists()
    run = Path("runs/tiny_qr/metagradient/seed_2")
    assert flags[flags.index("--output_dir") + 1] == str(run)
    assert collected == [(run, results / "tiny_qr" / "metagradient" / "seed_2")]


@pytest.mark.parametrize("name", tables.EXPERIMENTS)
def test_flags_of_every_variant_are_known(name, monkeypatch):
    """The training script reads the configuration and the flags."""
    monkeypatch.setattr(tables, "prepare", lambda kind, seed=0: f"data/{KINDS[kind] and kind}")
    monkeypatch.setattr(train, "check_arguments", lambda *args: None)
    for variant in tables.EXPERIMENTS[name]["variants"]:
        flags = tables.flags(name, variant, seed=1)
        (script_args, training_args, *_), _ = train.parse([*flags, "--use_cpu", "true", "--bf16", "false"])
        assert training_args.seed == 1 and script_args.dataset_name.startswith("data/")
        sequence = "expected" not in variant
        assert (training_args.credit_assignment == "sequence") == sequence


def test_a_wrong_name_is_an_error(capsys):
    for names, said in (
        (["tiny_uud"], "no experiment 'tiny_uud'"),
        (["tiny_67", "--variants", "x"], "no variant 'x'"),
    ):
        with pytest.raises(SystemExit):
            tables.main(["run", *names])
        assert said in capsys.readouterr().err
