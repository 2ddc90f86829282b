"""Variants of the recipe: each with its own model and measurements, and the reward is their mean."""

import json
from dataclasses import replace

import pytest
import torch

from trl_dpg import MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_causal_lm, tiny_tokenizer
from trl_dpg.variants import random_head


TEXTS = ["the red sun", "six seven", "old boat on the sea", "walk to the moon"]
RECIPE = TargetTrainingArguments(learning_rate=1e-3, batch_size=8)
PATTERN = [[1, -1], [-1, 1]]


def examples():
    return [{"input_ids": ids} for ids in tiny_tokenizer()(TEXTS)["input_ids"]]


@pytest.fixture
def make(causal_lm, tokenizer):
    def make(variants, metric=None, args=RECIPE):
        return MetagradientReward(
            causal_lm(seed=1), metric or LMHeadPattern(PATTERN), args, tokenizer, variants=variants
        )

    return make


def test_each_measures_for_itself(make, call, log, causal_lm):
    """`"auto"` of the recipe and of the metric, in the first batch; kept, put back after an evaluation, and resumed."""
    variants = [{}, {"learning_rate": 1e-2}, {"learning_rate": 1e-2, "model": causal_lm(seed=7)}]
    reward = make(variants)
    call(reward, TEXTS, **log.hooks)
    models = causal_lm(seed=1), causal_lm(seed=1), causal_lm(seed=7)
    raws = []
    for i, (target, changes) in enumerate(zip(models, variants, strict=True)):
        metric, changes = LMHeadPattern(PATTERN), {k: v for k, v in changes.items() if k != "model"}
        out = compute_metagradients(target, examples(), metric, replace(RECIPE, **changes))
        measured = reward.state()["variants"][i] or reward.state()
        assert measured["adam_epsilon_root"] == pytest.approx(out.adam_epsilon_root, rel=1e-6)
        assert measured["metric"]["scale_value"] == pytest.approx(metric.scale_value, rel=1e-6)
        assert log.metrics[f"variant_{i}/metric_gain"] == pytest.approx(out.metric_after - out.metric_before, rel=1e-5)
        raws.append(out.metagradients.double())
    mean = torch.stack(raws).mean(dim=0)
    assert log.columns["metagradient_raw"] == pytest.approx(mean.tolist(), rel=1e-5)
    gains = [log.metrics[f"variant_{i}/metric_gain"] for i in range(3)]
    assert log.metrics["metric_gain"] == pytest.approx(sum(gains) / 3)

    state = json.loads(json.dumps(reward.state()))
    call(reward, TEXTS[::-1])
    assert reward.state()["variants"] == state["variants"]
    resumed = make(variants)
    resumed.load_state(state)
    assert resumed.state() == reward.state()


def test_candidates_and_tokens_are_averaged(make, call, tokenizer):
    candidates = [torch.tensor([[5, 6, -1]]).repeat(len(ids), 1) for ids in tokenizer(TEXTS)["input_ids"]]
    found = {}
    for name, variants in {"a": None, "b": [{"learning_rate": 1e-2}], "both": [{}, {"learning_rate": 1e-2}]}.items():
        reward = make(variants, LMHeadNorm(), replace(RECIPE, adam_epsilon_root=1e-6))
        reward.credit_of_tokens, reward.candidate_ids = True, candidates
        reward.generator_processing_class = tokenizer
        call(reward, TEXTS)
        found[name] = torch.cat(reward._tokens), torch.cat(reward._candidates)
    for a, b, both in zip(*found.values(), strict=True):
        torch.testing.assert_close(both, (a + b) / 2)
        assert not torch.allclose(a, b)


def test_a_new_head(make, call, weights):
    """Drawn by its seed, in place for the runs alone."""
    reward = make([{"head_seed": 3}, {"head_seed": 3}, {"head_seed": 4}], LMHeadNorm())
    before = weights(reward.target_model)
    norms = [variant.head.norm().item() for variant in reward.variants]
    assert norms[0] == norms[1] != norms[2]
    call(reward, TEXTS)
    figures = reward.validate(examples(), torch.device("cpu"))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(reward.target_model).items())
    assert [v.head.norm().item() for v in reward.variants] == norms
    for i, norm in enumerate(norms):
        assert figures[f"variant_{i}_metric_before"] == pytest.approx(-norm)
    own = before["lm_head.weight"]
    assert figures["metric_before"] == pytest.approx(-own.norm().item())
    assert reward.variants[0].head.std().item() == pytest.approx(own.std().item(), rel=0.1)


def test_a_tied_head_cannot_be_drawn_anew(causal_lm, tokenizer):
    tied = causal_lm(seed=1, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="`head_seed` 3 .*tied.*target_untie_lm_head"):
        MetagradientReward(tied, LMHeadNorm(), RECIPE, tokenizer, variants=[{"head_seed": 3}])


def test_models_by_name(make_trainer, tmp_path):
    """Loaded once, as the target is; one with another tokenizer is refused."""
    _, other = save_tiny_models(tmp_path, seed=5)
    variants = [{"model": other}, {"model": other, "learning_rate": 1e-2}]
    trainer = make_trainer(target_variants=variants, max_steps=1)
    a, b = trainer.target_training.variants
    assert a.model is b.model is not trainer.target_training.target_model
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_metric_gain", "eval_variant_0_metric_gain", "eval_variant_1_pixel_accuracy"} <= metrics.keys()
    (row,) = [row for row in trainer.state.log_history if "reward" in row]
    assert row["metagradient/variant_0/metric_before"] == pytest.approx(row["metagradient/variant_1/metric_before"])
    _, foreign = save_tiny_models(tmp_path, seed=5, num_words=61)
    with pytest.raises(ValueError, match="`model` .* has another vocabulary"):
        make_trainer(target_variants=[{"model": foreign}])


REFUSED = {
    "[": "`target_variants` '\\[' is no JSON",
    "{}": "`target_variants` must be a list of one or more dicts",
    "[]": "`target_variants` must be a list of one or more dicts",
    '[{}, {"target_optim": "sgd"}]': r"`target_variants\[1\]` has the unknown field 'target_optim'",
    '[{"learning_rate": -1}]': r"`target_variants\[0\]`: `learning_rate` must be",
    '[{"head_seed": "a"}]': r"`target_variants\[0\]` needs a `head_seed`",
    '[{"model": 5}]': r"`target_variants\[0\]` needs a `model`",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_before_a_model_is_loaded(make_config, text):
    with pytest.raises(ValueError, match=REFUSED[text]):
        make_config(target_variants=text)


def test_unknown_field_of_a_reward():
    with pytest.raises(ValueError, match=r"`variants\[0\]` has the unknown field 'lr'"):
        MetagradientReward("no/such/model", LMHeadNorm(), variants=[{"lr": 1.0}])


def test_json(make_config):
    assert make_config(target_variants='[{}, {"seed": 1}]').target_variants == [{}, {"seed": 1}]


def test_a_new_head_is_like_the_old_one():
    """Of its type and shape."""
    head = random_head(tiny_causal_lm().bfloat16(), 0)
    assert head.dtype == torch.bfloat16 and head.shape == (64, 64)
