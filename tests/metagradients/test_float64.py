"""
Devices without float64, by a stand-in on the CPU: what is in float64 counts as the host's, and all else as the device's.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.runtime import host
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from trl_dpg.testing import tiny_causal_lm
from trl_dpg.validation import validate


COPIES = {"_to_copy", "copy_"}  # which go from one to the other
ON_THE_HOST = {"linalg_vector_norm"}  # of what was moved to the host, in float32, and is summed there in float64


class WithoutFloat64(TorchDispatchMode):
    """Refuses operations between the two, but for copies and single numbers, and float64 that does not come of a copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        given = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if name not in COPIES | ON_THE_HOST and isinstance(result, torch.Tensor):
            host_side = [a.dtype == torch.float64 for a in given if a.dim() > 0]
            assert len(set(host_side)) < 2, f"{name} is of a tensor on the host and another on the device"
            if given and result.dtype == torch.float64:
                assert any(a.dtype == torch.float64 for a in given), f"{name} makes float64 on the device"
        return result


EXAMPLES = [{"input_ids": [(3 * i + 7 * j) % 60 for j in range(6)]} for i in range(8)]


@pytest.mark.parametrize(
    "metric",
    [LMHeadNorm(), LMHeadPattern([[1, -1], [-1, 1]]), LanguageModelingLikelihood([{"input_ids": [1, 2, 3, 4]}])],
    ids=lambda metric: type(metric).__name__,
)
@pytest.mark.parametrize("curvature", ["exact", "central_difference"])
def test_metagradients(metric, curvature):
    args = TargetTrainingArguments(
        learning_rate=1e-3, batch_size=4, adam_epsilon_root="auto", curvature=curvature, max_grad_norm=0.01
    )
    model = tiny_causal_lm(hidden_size=16, num_layers=1)
    expected = compute_metagradients(model, EXAMPLES, metric, args).metagradients
    with WithoutFloat64():
        found = compute_metagradients(model, EXAMPLES, metric, args).metagradients
        validate(model, EXAMPLES, metric, args)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_stand_in_sees_float64():
    one = torch.ones(3)
    for wrong in (one.sum, one.norm, lambda dtype: one + one.to(dtype)):
        with WithoutFloat64(), pytest.raises(AssertionError):
            assert wrong(dtype=torch.float64) is None


def test_place_of_float64():
    assert host.float64_device(torch.device("mps")) == torch.device("cpu")
    assert host.float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert host.double(torch.ones(2)).dtype == torch.float64
