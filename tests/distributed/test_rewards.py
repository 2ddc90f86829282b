"""Rewards that split the generation batch, and advantages without groups: two gloo processes against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("rewards_worker.py")


def launch(rewards, processes, tmp_path):
    directory, output = tmp_path / f"{processes}", tmp_path / f"{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(WORKER.parents[2]),
    }
    result = subprocess.run(
        [*command, str(WORKER), *rewards, str(directory), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result, json.loads(output.read_text()) if result.returncode == 0 else None


def test_two_processes_equal_one(tmp_path):
    """`"metagradient"` without cross-group batching; `"mixed"` is one with real data beside generated, and variants."""
    rewards = ["naive", "metagradient", "mixed"]
    (_, ones), (result, twos) = (launch(rewards, processes, tmp_path) for processes in (1, 2))
    assert ones and twos, result.stderr[-3000:]
    for reward in rewards:
        one, two = ones[reward], twos[reward]
        assert len(one["steps"]) == len(two["steps"]) == 2
        for a, b in zip(one["steps"], two["steps"], strict=True):
            assert a["used"] == a["logged"] and b["used"] == b["logged"]
            assert a["rewards"] == b["rewards"] and "nan" in a["rewards"]
            for key in ("logged", "metagradient" if reward == "mixed" else reward, "raw"):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4 * max(map(abs, a[key])))
        assert two["predictions"] == one["predictions"] and len(set(one["predictions"])) > 1
        assert two["figures"] == pytest.approx(one["figures"], rel=1e-4, abs=1e-9)
    assert twos["mixed"]["figures"]["saved"] == 24 and twos["mixed"]["figures"]["metagradient/replayed"] == 12
    for step in twos["naive"]["steps"]:
        assert step["raw"][:4] == step["raw"][4:8] == step["raw"][8:] and len(set(step["raw"])) == 4
        assert sum(step["logged"]) == pytest.approx(0, abs=1e-4)
        assert abs(sum(step["logged"][:4])) > 1e-2


def test_failure_on_one_process_ends_both(tmp_path):
    result, _ = launch(["failing"], 2, tmp_path)
    assert result.returncode != 0
    assert "ArithmeticError: planted failure" in result.stderr
    assert "another process failed. ArithmeticError on process 1: planted failure" in result.stderr
