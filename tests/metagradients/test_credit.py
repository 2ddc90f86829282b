"""Metagradients of single tokens and of candidates, against float64 finite differences and the unrolled run."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.peers.unrolled import unrolled_metric
from tests.metagradients.cases import (
    CASES,
    VOCAB,
    gpt2,
    make_examples,
    metric,
    relative_error,
    rope_model,
)
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.kernels import switched


def with_candidates(examples, k=3):
    """Examples of which all but one have candidates: drawn ones, some missing, among them the token itself."""
    generator = torch.Generator().manual_seed(4)
    for i, example in enumerate(examples):
        candidates = torch.randint(-1, VOCAB, (len(example["input_ids"]), k), generator=generator)
        candidates[:, 0] = torch.tensor(example["input_ids"])
        example["candidates"] = candidates if i % 2 else candidates.tolist()
    return examples


def weights_of(examples):
    tokens = [torch.full((len(e["input_ids"]),), e["weight"], dtype=torch.float64) for e in examples]
    candidates = [torch.zeros(torch.as_tensor(e["candidates"]).shape, dtype=torch.float64) for e in examples]
    return tokens, candidates


def slope(function, step=1e-4):
    """Fourth-order central difference at 0."""
    values = {k: function(k * step) for k in (-2, -1, 1, 2)}
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)


def fitted_slope(function, step=5e-3):
    """Of a polynomial through 13 points, which averages out the float32 rounding inside a model."""
    shifts = [k * step for k in range(-6, 7)]
    return np.polynomial.Polynomial.fit(shifts, [function(shift) for shift in shifts], 5).deriv()(0.0)


def finite_differences(model, examples, args, of, slope=slope):
    """Slopes of the metric after the whole run in each weight of one example, of its tokens and of its candidates."""
    found = []
    for which in (0, 1):
        weights = weights_of(examples)
        flat = weights[which][of].view(-1)

        def value(shift, j, flat=flat, weights=weights):
            original = flat[j].item()
            flat[j] = original + shift
            result = unrolled_metric(model, examples, metric, args, *weights).item()
            flat[j] = original
            return result

        slopes = [slope(partial(value, j=j)) for j in range(len(flat))]
        found.append(torch.tensor(slopes, dtype=torch.float64).view(weights[which][of].shape))
    return found


NAMES = ["adamw-k1", "adamw-k4", "tied-adamw-k4", "sgd-k4", "clipping-adamw", "lora-adamw", "example", "max-length"]


@pytest.mark.parametrize("name", NAMES)
def test_against_finite_differences(name):
    """Of an example that is partly unsupervised and shorter than others of its batch."""
    make_model, fields = CASES[name]
    model, examples, args = make_model(), with_candidates(make_examples()), TargetTrainingArguments(**fields)
    out = compute_metagradients(model, examples, metric, args)
    tokens, candidates = finite_differences(model, examples, args, of=1)
    assert tokens[:2].eq(0).all() and tokens[2:].ne(0).all()  # two tokens without supervision
    assert relative_error(out.token_metagradients[1], tokens) < 1e-5
    assert relative_error(out.candidate_metagradients[1], candidates) < 1e-5


@pytest.mark.parametrize(
    "classes", [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)], ids=["llama", "qwen2"]
)
def test_rope_models(classes):
    """These round to float32 inside, also in a float64 model."""
    model, args = rope_model(*classes), TargetTrainingArguments(**CASES["adamw-k4"][1])
    examples = with_candidates(make_examples(n=4))
    out = compute_metagradients(model, examples, metric, args)
    tokens, candidates = finite_differences(model, examples, args, of=0, slope=fitted_slope)
    assert relative_error(out.token_metagradients[0], tokens) < 1e-4
    assert relative_error(out.candidate_metagradients[0], candidates) < 1e-4


def unrolled(model, examples, args):
    """Derivatives in all weights, by autograd through the whole run."""
    tokens, candidates = weights_of(examples)
    leaves = [w.requires_grad_() for w in (*tokens, *candidates)]
    value = unrolled_metric(model, examples, metric, args, tokens, candidates)
    grads = torch.autograd.grad(value, leaves)
    return grads[: len(tokens)], grads[len(tokens) :]


@pytest.fixture(params=["whole", "chunks"])
def head(request):
    """Logits whole, or of two tokens at once."""
    with switched(**{"logits_at_once": 0, "chunk": 2 * VOCAB} if request.param == "chunks" else {}):
        yield


@pytest.mark.parametrize("name", [*NAMES, "micro-batches", "adamw-k9", "linear-warmup"])
@pytest.mark.parametrize("curvature", ["exact", "central_difference"])
def test_against_the_unrolled_run(name, curvature, head):
    make_model, fields = CASES[name]
    model, examples = make_model(), with_candidates(make_examples())
    args = TargetTrainingArguments(**fields, curvature=curvature)
    expected = unrolled(model, examples, args)
    out = compute_metagradients(model, examples, metric, args)
    bound = 1e-6 if curvature == "exact" else 1e-2
    for actual, right in zip((out.token_metagradients, out.candidate_metagradients), expected, strict=True):
        assert [a.shape for a in actual] == [r.shape for r in right]
        assert all(a.dtype == torch.float32 and a.device.type == "cpu" for a in actual)
        assert (
            relative_error(torch.cat([a.flatten() for a in actual]), torch.cat([r.flatten() for r in right])) < bound
        )
    sums = torch.stack([tokens.sum() for tokens in out.token_metagradients])
    assert relative_error(sums, out.metagradients.double()) < 1e-6


def test_a_token_that_is_its_own_candidate():
    """One more of what stands there is what its weight says."""
    model, args = gpt2(), TargetTrainingArguments(**CASES["adamw-k4"][1])
    out = compute_metagradients(model, with_candidates(make_examples()), metric, args)
    for tokens, candidates in zip(out.token_metagradients, out.candidate_metagradients, strict=True):
        assert torch.allclose(tokens, candidates[:, 0], rtol=1e-6, atol=0)


def test_candidates_of_all_words_cancel():
    """Weighted by the model's own probabilities: the mean of the score is zero."""
    model, args = gpt2().eval(), TargetTrainingArguments(**CASES["adamw-k1"][1])
    examples = make_examples()
    for example in examples:
        example["candidates"] = torch.arange(VOCAB).expand(len(example["input_ids"]), VOCAB)
    out = compute_metagradients(model, examples, metric, args)
    for example, candidates in zip(examples, out.candidate_metagradients, strict=True):
        p = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].softmax(dim=-1)
        assert (p * candidates[1:]).sum(dim=1).abs().max() < 1e-6 * candidates.abs().max()


def test_candidates_change_nothing_else():
    model, args = gpt2(), TargetTrainingArguments(**CASES["adamw-k4"][1])
    without = compute_metagradients(model, make_examples(), metric, args)
    out = compute_metagradients(model, with_candidates(make_examples()), metric, args)
    assert without.candidate_metagradients is None
    assert relative_error(out.metagradients, without.metagradients.double()) < 1e-6
    assert out.metric_after == pytest.approx(without.metric_after, rel=1e-12)


def test_own_numbers_of_candidates():
    """Examples without candidates, with one and with many, and what is beyond `max_length`."""
    examples = make_examples()
    examples[1]["candidates"] = torch.full((6, 1), 3)
    examples[2]["candidates"] = torch.arange(8 * VOCAB).view(8, VOCAB) % VOCAB
    args = TargetTrainingArguments(**CASES["adamw-k4"][1], max_length=5)
    out = compute_metagradients(gpt2(), examples, metric, args)
    assert [tuple(c.shape) for c in out.candidate_metagradients] == [
        (4, 0),
        (6, 1),
        (8, VOCAB),
        (4, 0),
        (6, 0),
        (8, 0),
    ]
    assert [len(tokens) for tokens in out.token_metagradients] == [4, 6, 8, 4, 6, 8]
    for values in (out.token_metagradients[2], out.candidate_metagradients[2].abs().sum(dim=1)):
        assert values[0] == 0 and values[1:5].ne(0).all() and values[5:].eq(0).all()


def test_positions_of_padded_examples():
    """Results are at the positions that were given, also behind padding on the left."""
    args = TargetTrainingArguments(**CASES["adamw-k4"][1])
    plain = with_candidates(make_examples())
    padded = []
    for example in plain:
        ids, labels, candidates = (torch.as_tensor(example[key]) for key in ("input_ids", "labels", "candidates"))
        padded.append(
            {
                "input_ids": F.pad(ids, (2, 1)),
                "labels": F.pad(labels, (2, 1), value=-100),
                "candidates": F.pad(candidates, (0, 0, 2, 1)),
                "attention_mask": F.pad(torch.ones_like(ids), (2, 1)),
                "weight": example["weight"],
            }
        )
    expected, out = (compute_metagradients(gpt2(), examples, metric, args) for examples in (plain, padded))
    for i in range(len(plain)):
        assert torch.equal(out.token_metagradients[i], F.pad(expected.token_metagradients[i], (2, 1)))
        assert torch.equal(out.candidate_metagradients[i], F.pad(expected.candidate_metagradients[i], (0, 0, 2, 1)))


@pytest.mark.parametrize(
    "candidates", [[[1], [2]], [1, 2, 3], [[1.0], [2.0], [3.0]], [[VOCAB], [1], [1]], [[-2], [1], [1]], "abc"]
)
def test_bad_candidates(candidates):
    examples = [{"input_ids": [1, 2, 3], "candidates": candidates}]
    with pytest.raises(ValueError, match=r"`examples\[0\]` .*`candidates`"):
        compute_metagradients(gpt2(), examples, metric)
