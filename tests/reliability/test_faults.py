"""The benchmark of faults, in small: kills, full disks and batches of NaN on the way, and the same end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_faults_change_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--steps", "40", "--seconds", "2", "--seed", "1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "faults.json")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "faults.json").read_text())
    assert result["same weights"] and result["same log"] and result["broken checkpoints left"] == 0
    assert result["killed"] + result["full disk"] > 0
