"""The README's command lines, run as they stand, from the preparation of data to the ranking of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, read_blocks


@pytest.mark.slow
def test_readme_command_lines(tmp_path):
    """Two minutes of two cores."""
    (block,) = (block for block in read_blocks("README.md", "bash") if "trl-dpg train" in block.code)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    printed = {}
    for line in block.code.splitlines():
        command = line.partition("  # ")[0]
        if command.startswith("source "):  # the environment of the test stands for it
            continue
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command.split()[1]] = done.stdout

    assert (tmp_path / "runs/mine/report.html").exists()
    assert "TRL-DPG" in printed["verify"]  # read by a QR reader after stock fine-tuning
    texts = [json.loads(row)["text"] for row in (tmp_path / "data.jsonl").read_text().splitlines()]
    scores = [json.loads(row) for row in (tmp_path / "runs/value/scores.jsonl").read_text().splitlines()]
    assert sorted(row["text"] for row in scores) == sorted(texts)
    assert (tmp_path / "runs/value/index.html").exists()
