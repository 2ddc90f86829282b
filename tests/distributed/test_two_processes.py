"""Two gloo processes against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("worker.py")


def launch(scenario, processes, tmp_path, check=True):
    directory = tmp_path / f"{scenario}-{processes}"
    output = tmp_path / f"{scenario}-{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # `accelerate launch --cpu --num_processes 2` would run one process
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(WORKER.parents[2]),
    }
    result = subprocess.run(
        [*command, str(WORKER), scenario, str(directory), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(output.read_text())
    return result


def assert_close(one, two):
    """Equal to 1e-5 relative, in nested results; metagradients relative to the largest of their batch."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key])
    elif isinstance(one, list) and one and isinstance(one[0], float):
        assert len(one) == len(two)
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5 * max(abs(value) for value in one))
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)
    else:
        assert one == pytest.approx(two, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("scenario", ["engine", "stock_trainer", "our_trainer"])
def test_two_processes_equal_one(scenario, tmp_path):
    one, two = (launch(scenario, processes, tmp_path) for processes in (1, 2))
    if scenario != "engine":
        trained = [row for row in one["rows"] if row["raw"] and "metagradient/std" in row]
        assert len(trained) == 2 and all(len(row["raw"]) == 12 and len(set(row["raw"])) > 6 for row in trained)
    if scenario == "our_trainer":
        assert sum("eval_metric" in row for row in one["rows"]) == 2
    assert_close(one, two)


def test_texts_are_judged_once(tmp_path):
    first, second = launch("judge", 2, tmp_path)
    assert first == [0.25, "planted failure"]
    assert second == [
        0.25,
        "The run ends because another process failed. ArithmeticError on process 0: planted failure",
    ]


def test_a_run_is_resumed_with_its_target_in_shards(tmp_path):
    """To the last bit, from the middle of a generation batch."""
    results = launch("resumed", 2, tmp_path)
    assert results["in_shards"]
    rows = results["whole"]["history"]
    assert sum("metagradient/std" in row for row in rows) == 2 and any("eval_metric" in row for row in rows)
    assert results["resumed"] == results["whole"]


def test_failure_on_one_process_ends_both(tmp_path):
    result = launch("failure", 2, tmp_path, check=False)
    assert result.returncode != 0
    assert "ArithmeticError: planted failure" in result.stderr
    assert "another process failed. ArithmeticError on process 1: planted failure" in result.stderr


def test_failure_between_model_calls_ends_both(tmp_path):
    """The process that did not fail says why it ends, here twice, instead of waiting for the other."""
    for reason, method in zip(launch("failing_tape", 2, tmp_path), ("push", "restore"), strict=True):
        assert "another process failed. OSError on process 1: planted failure of " + method in reason
