"""Sums of metrics, and conditions."""

import json

import pytest
import torch

from trl_dpg.metagradients.metric import description
from trl_dpg.metrics import (
    KeepAbove,
    KeepBelow,
    LanguageModelingLikelihood,
    LMHeadNorm,
    LMHeadPattern,
    Metric,
    Perplexity,
    as_metric,
)
from trl_dpg.publishing.outcome import outcome
from trl_dpg.testing import tiny_tokenizer


ROWS = [{"text": "the cat sat on the mat."}, {"text": "one two"}]
OTHER = [{"text": "a quick brown fox"}]


def bias(model):
    """Level of the final bias."""
    return model.transformer.ln_f.bias.sum()


class Nudged(Metric):
    """A value that is set by hand."""

    value = 1.0

    def __call__(self, model):
        return torch.tensor(self.value, dtype=torch.float64)


def test_values_add_up(gpt2, tokenizer, move):
    likelihood, norm = LanguageModelingLikelihood(ROWS, tokenizer), LMHeadNorm()
    move(gpt2, 0.1)
    a, b, f = likelihood(gpt2).item(), norm(gpt2).item(), bias(gpt2).item()
    for metric, expected in [
        (likelihood + 0.1 * norm, a + 0.1 * b),
        (likelihood - norm * 2, a - 2 * b),
        (-likelihood, -a),
        (likelihood + bias, a + f),
        (bias + likelihood, a + f),
        (bias - likelihood, f - a),
        (as_metric(bias) * 3, 3 * f),
        (2 * (likelihood - (norm + bias)), 2 * (a - b - f)),
        (likelihood + 0 * norm, a),
    ]:
        metric.setup(gpt2)
        assert metric(gpt2).item() == pytest.approx(expected, rel=1e-12)
        assert metric(gpt2).dtype == torch.float64 and metric(gpt2).shape == ()


def test_gradient_of_a_sum(gpt2, tokenizer, assert_gradient, move):
    metric = LMHeadPattern([[1, -1]], scale=20) + 0.1 * LanguageModelingLikelihood(ROWS, tokenizer) - bias
    metric.setup(gpt2)
    move(gpt2, 0.01)
    assert_gradient(metric, gpt2, rtol=1e-6)


@pytest.mark.parametrize("other", [1, LMHeadNorm, "norm"])
def test_what_cannot_be_added(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        LMHeadNorm() + other
    with pytest.raises(TypeError, match="unsupported operand"):
        other - LMHeadNorm()
    with pytest.raises(ValueError, match="weight .* finite, got nan"):
        float("nan") * LMHeadNorm()


def test_a_sum_needs_a_weight(causal_lm):
    model, nothing = causal_lm(), 0 * LMHeadNorm()
    for use in (nothing.setup, nothing):
        with pytest.raises(ValueError, match="all weights .* are 0"):
            use(model)
    assert (nothing + LMHeadNorm())(model) == LMHeadNorm()(model)


def test_readouts_of_all_parts(gpt2, tokenizer, move):
    parts = [LMHeadPattern([[1, -1]]), LanguageModelingLikelihood(ROWS, tokenizer), Perplexity(OTHER, tokenizer)]
    metric = parts[0] + parts[1] - 0 * parts[2] + Perplexity(ROWS, tokenizer)
    metric.setup(gpt2)
    move(gpt2, 0.1)
    likelihood, perplexity = parts[1](gpt2).item(), parts[2](gpt2).item()
    values = metric.readouts(gpt2)
    assert values == pytest.approx(
        {
            "pixel_accuracy": values["pixel_accuracy"],
            "perplexity": parts[1].readouts(gpt2)["perplexity"],
            "perplexity_perplexity": perplexity,
            "perplexity_2_perplexity": parts[1].readouts(gpt2)["perplexity"],
            "lm_head_pattern_value": parts[0](gpt2).item(),
            "language_modeling_likelihood_value": likelihood,
            "perplexity_value": perplexity,
            "perplexity_2_value": values["perplexity"],
        },
        rel=1e-12,
    )
    assert metric.picture()[1].tolist() == [[1, -1]]


def test_state_of_all_parts(gpt2, move):
    metrics = [as_metric(bias) + LMHeadPattern([[1, -1]], scale="auto") for _ in range(2)]
    for metric in metrics:
        metric.setup(gpt2)
    move(gpt2, 0.1)
    value = metrics[0](gpt2).item()  # measures the scale
    state = json.loads(json.dumps(metrics[0].state()))
    metrics[1].load_state(state)
    move(gpt2, 0.1, seed=1)
    assert metrics[1](gpt2).item() == metrics[0](gpt2).item() != value
    assert metrics[1].parts[1][1].scale_value == metrics[0].parts[1][1].scale_value is not None


def test_description_of_a_sum():
    condition = KeepBelow(Perplexity(ROWS), factor=1.01)
    metric = LMHeadPattern.qr("DPG") + 1000 * condition - 0.5 * as_metric(bias) + 5 * KeepBelow(Perplexity(OTHER), 9)
    said = description(metric)
    json.dumps(said)
    assert said["name"] == "LMHeadPattern + 1000 * KeepBelow(Perplexity) + -0.5 * bias + 5 * KeepBelow(Perplexity)"
    assert said["effect"].startswith("a QR code that reads “DPG”")
    assert "its `Perplexity` stays below 1.01 times that of the untouched target" in said["effect"]
    assert "its `bias` falls" in said["effect"] and "stays below 9" in said["effect"]
    assert said["picture"] == "signs of the change in the LM head"
    assert said["conditions"] == ["perplexity_below_limit", "keep_below_perplexity_2_perplexity_below_limit"]
    assert said["readouts"] == [*said["conditions"], "pixel_accuracy", "qr_decoded"]
    assert description(LMHeadNorm() + bias)["readouts"] == ["metric_gain"]


def test_verdict_of_a_sum():
    metric = LMHeadPattern([[1, -1]]) + KeepBelow(Perplexity(ROWS), factor=1.01)
    for accuracy, holds, passed in [(0.95, 1.0, True), (0.5, 1.0, False), (0.95, 0.0, False)]:
        data = {"metric": 0.0, "pixel_accuracy": accuracy, "perplexity_below_limit": holds}
        verdict, criterion = metric.judge(data, {"metric": 1.0})
        assert verdict == passed and "of the pixels are right, and perplexity below limit" in criterion
    metric = LMHeadNorm() + bias
    assert metric.judge({"metric": 1.0}, {"metric": 0.0})[0] and not metric.judge({"metric": 0.0}, {"metric": 0.0})[0]


@pytest.mark.parametrize(("accuracy", "holds", "verdict"), [(1, 1, "reached"), (1, 0, "not reached"), (0.9, 1, "not")])
def test_outcome_of_a_run_with_a_condition(accuracy, holds, verdict):
    metric = LMHeadPattern([[1, -1]]) + KeepBelow(Perplexity(ROWS), factor=1.01)
    means = {"pixel_accuracy": accuracy, "perplexity_below_limit": holds, "metric_gain": 1.0}
    after = {"step": 8, "draws": 1, "mean": means, "standard_error": {}}
    facts = {"metric": description(metric), "validation": {"eval": {"before": None, "after": after}}}
    assert f"this was {verdict}" in outcome(facts)


def test_condition_is_zero_while_it_holds(gpt2):
    inner = Nudged()
    for condition, good, bad in [(KeepBelow(inner, 2.0), 1.5, 2.5), (KeepAbove(inner, -2.0), -1.5, -2.5)]:
        condition.setup(gpt2)
        inner.value = good
        assert condition(gpt2).item() == 0.0
        inner.value = bad
        assert condition(gpt2).item() == pytest.approx(-(0.25**2), rel=1e-12)
    values = condition.readouts(gpt2)
    assert values == {"nudged_above_limit": 0.0, "nudged_above_limit_by": pytest.approx(-0.25)}
    zero = KeepBelow(inner, 0)
    inner.value = 0.5
    assert zero(gpt2).item() == pytest.approx(-0.25)


@pytest.mark.parametrize("value", [2.0, -2.0])
def test_limit_relative_to_the_untouched_target(gpt2, value):
    inner = Nudged()
    inner.value = value
    below, above = KeepBelow(inner, factor=1.01), KeepAbove(inner, factor=0.99)
    for condition in (below, above):
        condition.setup(gpt2)
        assert condition(gpt2).item() == 0.0
        assert condition.readouts(gpt2)[f"nudged_{condition.side}_limit"] == 1.0
    assert below.limit == pytest.approx(value + 0.02) and above.limit == pytest.approx(value - 0.02)
    inner.value = 3.0  # another target: `setup` comes before every run
    below.setup(gpt2)
    assert below.limit == pytest.approx(3.03)


def test_gradient_of_a_condition(gpt2, tokenizer, assert_gradient, move):
    """Below, at and above the limit."""
    perplexity = Perplexity(ROWS, tokenizer)
    parameters = list(gpt2.parameters())
    value = perplexity(gpt2).item()
    for limit in (1.5 * value, value):
        gradients = torch.autograd.grad(KeepBelow(perplexity, limit)(gpt2), parameters)
        assert all((gradient == 0).all() for gradient in gradients)
    assert_gradient(KeepBelow(perplexity, 0.5 * value), gpt2)
    assert_gradient(KeepAbove(perplexity, 2 * value), gpt2)
    # No kink: just beyond the limit, Φ and its slope are of second and first order of the excess.
    beyond = KeepBelow(perplexity, value / (1 + 1e-4))
    assert beyond(gpt2).item() == pytest.approx(-1e-8, rel=1e-6)
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(beyond(gpt2), parameters)) < 1e-2


def test_a_run_with_a_condition(make_trainer):
    """The limit is measured on the untouched target, and a checkpoint and cards can be written."""
    texts = [{"text": "good ask blue old"}]
    metric = LMHeadNorm() + 10 * KeepBelow(Perplexity(texts, tiny_tokenizer()), factor=1.01)
    trainer = make_trainer(metric=metric, max_steps=1, save_strategy="steps", save_steps=1)
    untouched = metric.parts[1][1].metric(trainer.target_training.target_model).item()
    trainer.train()
    values = trainer.evaluate()
    assert metric.parts[1][1].limit == pytest.approx(1.01 * untouched, rel=1e-6)
    assert values["eval_perplexity_below_limit"] in (0.0, 1.0)
    assert values["eval_metric"] == pytest.approx(
        values["eval_lm_head_norm_value"] + 10 * values["eval_keep_below_perplexity_value"], rel=1e-9
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LMHeadNorm, 1.0), "`metric` must be .* instance"),
        ((bias,), "One of `limit` and `factor`"),
        ((bias, 1.0, 1.0), "One of `limit` and `factor`"),
        ((bias, float("inf")), "`limit` must be finite, got inf"),
        ((bias, None, float("nan")), "`factor` must be finite, got nan"),
    ],
)
def test_bad_conditions(arguments, message):
    metric, limit, factor = (*arguments, None, None)[:3]
    with pytest.raises(ValueError, match=message):
        KeepBelow(metric, limit, factor=factor)


def test_a_condition_without_its_limit(gpt2):
    with pytest.raises(ValueError, match=r"`KeepBelow.setup\(model\)` must be called"):
        KeepBelow(LMHeadNorm(), factor=1.01)(gpt2)
