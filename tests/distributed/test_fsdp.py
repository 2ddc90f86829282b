"""The generator sharded by FSDP2, and the target too, over two processes on the CPU: nothing changes but where weights lie."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


WORKER = Path(__file__).with_name("fsdp_worker.py")

# What `accelerate launch` makes of examples/accelerate_configs/fsdp2.yaml (see tests/examples/test_scaling_configs.py)
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def train(directory, environment, **fields):
    """Results of a run on two processes, and the weights before and after it, from what was saved."""
    directory.mkdir()
    output = directory / "results.json"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            str(WORKER),
            str(directory),
            str(output),
            json.dumps(fields),
        ],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(WORKER.parents[2]),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=900,  # DeepSpeed compiles an extension when it first runs
    )
    assert result.returncode == 0, result.stderr[-3000:]
    folders = next(directory.glob("models/*/generator")), directory / "generator"
    before, after = (dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in folders)
    return json.loads(output.read_text()), before, after


@pytest.mark.slow
def test_fsdp2_equals_data_parallel(tmp_path):
    plain, original, plain_weights = train(tmp_path / "plain", {})
    assert (plain["distributed_type"], plain["is_sharded"]) == ("MULTI_CPU", False)
    sharded = train(tmp_path / "fsdp2", FSDP2)
    assert sharded[0]["target_is_whole"]
    check_equal(sharded, plain, original, plain_weights)
    both = train(tmp_path / "both", FSDP2, target_fsdp=True)
    assert both[0]["target_is_sharded"] and both[0]["target_share"] == both[0]["target_size"] // 2
    check_equal(both, plain, original, plain_weights)


def check_equal(run, plain, original, plain_weights, kind=("FSDP", True)):
    sharded, _, sharded_weights = run
    assert (sharded["distributed_type"], sharded["is_sharded"]) == kind

    # rewards of both steps, validation before and after them, and one of what the generator itself writes
    assert len(sharded["rows"]) == len(plain["rows"])
    trained = [row for row in sharded["rows"] if "metagradient/std" in row]
    assert len(trained) == 2 and all(len(set(row["raw"])) > 6 for row in trained)
    assert sum("eval_metric" in row for row in sharded["rows"]) == 3
    for ours, theirs in zip(sharded["rows"], plain["rows"], strict=True):
        assert ours["rewards"].get("metagradient", []) == pytest.approx(
            theirs["rewards"].get("metagradient", []), rel=1e-5, abs=1e-5
        )
        scalars = {key: value for key, value in theirs.items() if isinstance(value, float)}
        assert {key: ours[key] for key in scalars} == pytest.approx(scalars, rel=1e-5, abs=1e-8)

    # the generator that was trained on them, as saved
    change = sum((plain_weights[name] - weight).norm() for name, weight in original.items())
    assert change > 0.1
    sharded_weights, plain_weights = dict(sharded_weights), dict(plain_weights)
    for weights in (sharded_weights, plain_weights):
        for name in [name for name in weights if name.endswith("c_attn.bias")]:
            # softmax does not see a bias of keys: its gradient is rounding, which Adam blows up
            weights[name] = weights[name].view(3, -1)[[0, 2]]
    torch.testing.assert_close(sharded_weights, plain_weights, rtol=1e-4, atol=1e-6)
    assert sharded["eval_mean_length"] == plain["eval_mean_length"]
