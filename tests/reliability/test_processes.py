"""Two processes, something happens to one: both end, the cause is on the screen, and nothing is left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


WORKER = Path(__file__).with_name("worker.py")


def command(*arguments, processes=2):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(WORKER),
        *arguments,
    ]


def environment(temporary):
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(WORKER.parents[2]),
        "TMPDIR": str(temporary),
    }


def run(tmp_path, what, where):
    """Ends within the time given, or the test fails: far below the 30 minutes that a collective waits unless told otherwise."""
    run_directory, temporary = tmp_path / "run", tmp_path / "tmp"
    run_directory.mkdir()
    temporary.mkdir()
    process = subprocess.Popen(
        command(what, where, str(run_directory)),
        env=environment(temporary),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if what == "launcher":
            while not (run_directory / "reached").exists():
                assert process.poll() is None, process.stderr.read()[-3000:]
                time.sleep(0.2)
            process.terminate()
        _, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode != 0
    pids = [int(path.read_text()) for path in run_directory.glob("pid-*")]
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)
    left = [path.name for path in run_directory.iterdir() if not path.name.startswith(("pid-", "reached", "run"))]
    assert left == []  # the tape lay here
    assert not [path for path in temporary.iterdir() if "trl_dpg" in path.name]
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("where", ["metric", "reward"])
def test_an_exception(where, tmp_path):
    """Inside a block in which processes agree on failures, and in the user's own reward, where they do not."""
    errors = run(tmp_path, "raise", where)
    assert "ArithmeticError: planted failure" in errors and "in happen" in errors
    if where == "metric":
        assert "another process failed. ArithmeticError on process 1: planted failure" in errors


@pytest.mark.slow
@pytest.mark.parametrize("where", ["metric", "reward"])
def test_a_killed_process(where, tmp_path):
    errors = run(tmp_path, "kill", where)
    cause = errors[errors.index("Root Cause") :]
    assert "rank      : 1" in cause and "SIGKILL" in cause


@pytest.mark.slow
@pytest.mark.parametrize("where", ["metric", "reward"])
def test_a_process_that_hangs(where, tmp_path):
    """The other waits for `ddp_timeout`, here 10 seconds; then the one that hangs prints where."""
    errors = run(tmp_path, "hang", where)
    assert "Timed out waiting 10000ms" in errors
    assert f"in {'readouts' if where == 'metric' else 'reward'}\n" in errors and "in happen\n" in errors


@pytest.mark.slow
def test_a_process_that_hangs_and_cannot_be_asked_to_end(tmp_path):
    """The launcher asks it by SIGTERM, and kills it half a minute later."""
    errors = run(tmp_path, "stubborn", "reward")
    assert "Timed out waiting 10000ms" in errors and "SIGKILL" in errors


@pytest.mark.slow
def test_a_launcher_that_is_ended(tmp_path):
    """By Ctrl-C, a scheduler or `kill`: what it started ends, too."""
    run(tmp_path, "launcher", "metric")


@pytest.mark.slow
def test_memory_that_runs_out_on_one_process(tmp_path):
    """Both go on with the same smaller size and get the same; a metric that runs out of memory ends both."""
    results = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        directory.mkdir()
        launched = subprocess.run(
            command("memory", "", str(directory), processes=processes),
            env=environment(directory),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert launched.returncode == 0, launched.stderr[-3000:]
        results.append([json.loads((directory / f"{i}.json").read_text()) for i in range(processes)])
        assert "Memory ran out: from here on" in launched.stderr
    (alone,), both = results
    metric = [each.pop("metric") for each in both]
    assert metric[1].startswith("MemoryError: `metric` ran out of memory")
    assert metric[0].startswith("RuntimeError: The run ends because another process failed. MemoryError on process 1")
    assert alone.pop("metric").startswith("MemoryError")
    assert alone.keys() == both[0].keys() and len(alone) == 9
    for name, expected in alone.items():
        for mine in (expected, *(each[name] for each in both)):
            assert mine["size"] == (None if name.endswith("None") else 1)
            largest = max(abs(value) for value in expected["metagradients"])
            tolerance = 1e-5 if name.startswith("central") else 1e-6
            assert mine["metagradients"] == pytest.approx(expected["metagradients"], rel=0, abs=tolerance * largest)
