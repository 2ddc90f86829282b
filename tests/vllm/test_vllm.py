"""
Generation by vLLM itself, in processes of its own. Skipped where it is not installed; `python tests/versions.py vllm` sets up an
environment of its own with vLLM for CPUs, and runs this there.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")]

WORKER = Path(__file__).with_name("worker.py")


def found_by(trial: str, folder: Path, *args: str):
    """What a trial found, in a process of its own."""
    folder.mkdir(exist_ok=True)
    root = str(WORKER.parents[2])
    done = subprocess.run(
        [sys.executable, WORKER, trial, folder, *args],
        env={**os.environ, "PYTHONPATH": root},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_completions_are_those_of_transformers(tmp_path, kind):
    """Greedy ones, before and after an update of the weights."""
    found = found_by("training", tmp_path, kind)
    assert found["vllm"] == found["transformers"]
    before, after = found["vllm"]
    assert before != after


def test_completions_of_one_prompt_differ_and_so_do_seeds(tmp_path):
    one, again, other = (
        found_by("seeds", tmp_path / name, seed)["completions"] for name, seed in [("1", "1"), ("1b", "1"), ("2", "2")]
    )
    assert len(set(map(tuple, one))) == len(one) == 16
    assert one == again and not set(map(tuple, one)) & set(map(tuple, other))


def test_the_best_checkpoint_is_what_is_evaluated(tmp_path):
    found = found_by("best", tmp_path)
    assert found["best"] == "checkpoint-1"
    assert found["vllm"] == found["transformers"]


def test_command(tmp_path):
    from trl_dpg.testing import WORDS

    found = found_by("command", tmp_path)
    texts = found["llama_vllm"]
    groups = [texts[prompt::16] for prompt in range(16)]  # the last one's prompt is empty
    assert all(len(set(group)) == 4 for group in groups)
    said = {word for text in texts for word in text.split()}
    assert len(said) > 20 and said.isdisjoint(WORDS[:12])
    assert found["adapter_vllm"] == found["adapter_transformers"]
