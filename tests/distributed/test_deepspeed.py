"""The generator under DeepSpeed on two processes of a CPU: nothing changes. Needs `pip install deepspeed`."""

from importlib.util import find_spec

import pytest

from tests.distributed.test_fsdp import check_equal, train


# What `accelerate launch` makes of examples/accelerate_configs/deepspeed_zero2.yaml and deepspeed_zero3.yaml
ZERO = {
    2: {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    3: {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}
COMMON = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="DeepSpeed is an extra that no test environment installs: pip install deepspeed",
)
# ZeRO-3 only splits weights of more than 100,000 numbers, as embeddings of 2,000 words are. Of 5,000 words, not all are candidates.
@pytest.mark.parametrize(("stage", "num_words"), [(2, 60), (3, 2000), (3, 5000)])
def test_deepspeed_equals_data_parallel(tmp_path, stage, num_words):
    plain, original, plain_weights = train(tmp_path / "plain", {}, num_words=num_words)
    run = train(tmp_path / "zero", {**COMMON, **ZERO[stage]}, num_words=num_words)
    assert run[0]["target_is_whole"]
    check_equal(run, plain, original, plain_weights, kind=("DEEPSPEED", False))
