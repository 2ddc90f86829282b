"""`make gpu` works: all of its parts run on a CPU, with tiny models."""

from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_saves_its_table(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(Path(gpu.__file__).parents[1])
    assert gpu.run_parts(list(gpu.PARTS), "cpu", tmp_path, limited=False), capfd.readouterr().out
    for name in gpu.PARTS:
        table = (tmp_path / f"{name}.md").read_text()
        assert ("skipped" if name == "tests" else "|---") in table, (name, (tmp_path / f"{name}.log").read_text())


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped_and_kept(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setitem(
        gpu.PARTS,
        "step",
        (1, [], ["timeit", "-n", "1", "-r", "1", "import time; print('begun', flush=True); time.sleep(60)"]),
    )
    assert gpu.run_parts(["step"], "cpu", tmp_path)
    assert (tmp_path / "step.md").read_text() == "begun\n" and "stopped after 1 s" in capfd.readouterr().out


def test_parts_take_nine_minutes_at_most():
    assert sum(limit for limit, _, _ in gpu.PARTS.values()) <= 9 * 60
