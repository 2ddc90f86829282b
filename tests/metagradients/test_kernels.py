"""Every shortcut can be switched off: results stay, and only cost changes."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tests.metagradients.cases import CASES, VOCAB, make_examples, metric, relative_error
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.kernels import switched
from trl_dpg.metagradients.kernels.gelu import closed_form_gelus
from trl_dpg.metagradients.kernels.linear import WithoutWeightGradients


NAMES = ["adamw-k1", "adamw-k4", "tied-adamw-k4", "sgd-k4", "muon-k4", "clipping-adamw", "lora-adamw", "micro-batches"]
# name: (with the shortcut, without it)
SHORTCUTS = {
    "chunked head": ({"logits_at_once": 0, "chunk": 3 * VOCAB}, {"logits_at_once": math.inf}),
    "no gradients of weights": (
        {"logits_at_once": math.inf, "graph_contexts": (lambda model: WithoutWeightGradients(),)},
        {"logits_at_once": math.inf, "graph_contexts": ()},
    ),
    "closed-form GELU": (
        {"logits_at_once": math.inf, "graph_contexts": (closed_form_gelus,)},
        {"logits_at_once": math.inf, "graph_contexts": ()},
    ),
}


def run(switches, name):
    make_model, fields = CASES[name]
    examples = [{**row, "candidates": [[(t + 1) % VOCAB, -1] for t in row["input_ids"]]} for row in make_examples()]
    with switched(**switches):
        return compute_metagradients(make_model(), examples, metric, TargetTrainingArguments(**fields))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_results_stay(shortcut, name):
    on, off = (run(switches, name) for switches in SHORTCUTS[shortcut])
    assert relative_error(on.metagradients, off.metagradients.double()) < 1e-6
    assert relative_error(torch.cat(on.token_metagradients), torch.cat(off.token_metagradients).double()) < 1e-6
    for ours, theirs in zip(on.candidate_metagradients, off.candidate_metagradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert on.losses == pytest.approx(off.losses, rel=1e-12) and on.metric_after == pytest.approx(off.metric_after)


def test_chunks_keep_less():
    """No graph keeps more than a chunk of logits."""
    largest = []
    for switches in SHORTCUTS["chunked head"]:
        kept = [0]

        def note(tensor, kept=kept):
            if tensor.shape[-1:] == (VOCAB,) and tensor.dim() == 3:
                kept.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            run(switches, "adamw-k4")
        largest.append(max(kept))
    assert largest[0] == 0 < largest[1]


def test_gradients_that_are_left_out_cost_nothing():
    """One of nine matrix products of a layer."""
    flops = []
    for switches in SHORTCUTS["no gradients of weights"]:
        with FlopCounterMode(display=False) as counter:
            run(switches, "adamw-k9")
        flops.append(counter.get_total_flops())
    assert 0.85 < flops[0] / flops[1] < 0.97


def test_closed_forms_keep_less():
    """The second derivative of GELU, elementwise operation by operation, is most of what a graph keeps."""
    kept = []
    for switches in SHORTCUTS["closed-form GELU"]:
        sizes: list[int] = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            run(switches, "adamw-k4")
        kept.append(sum(sizes))
    assert kept[0] < 0.8 * kept[1]
