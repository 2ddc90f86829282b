"""Rewards that split the generation batch by rollout index: `cross_group_batching=False` and the naive one."""

import math
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl_dpg import MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, train_and_measure
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern
from trl_dpg.rewards import NaiveReward


# Two prompts, three completions each: dataset j is every prompt's j-th completion.
TEXTS = ["the red sun", "six seven", "old boat on the sea", "walk to the moon", "cold snow", "you see the blue sky"]
DATASETS = [[0, 3], [1, 4], [2, 5]]


def recipe(**fields):
    return TargetTrainingArguments(
        **{"learning_rate": 1e-2, "batch_size": 1, "adam_epsilon_root": 1e-6, "seed": 3, **fields}
    )


def standardized(raw):
    return ((raw - np.mean(raw)) / np.std(raw)).tolist()


@pytest.fixture
def make(causal_lm, tokenizer):
    """Makes a reward that splits its batches into three datasets."""

    def make(reward_class, **kwargs):
        if issubclass(reward_class, MetagradientReward):
            kwargs["cross_group_batching"] = False
        defaults = {"target_model": causal_lm(seed=1), "metric": LMHeadNorm(), "args": recipe(), "num_generations": 3}
        return reward_class(**{**defaults, "processing_class": tokenizer, **kwargs})

    return make


@pytest.fixture
def examples(tokenizer):
    return [{"input_ids": ids} for ids in tokenizer(TEXTS)["input_ids"]]


both = pytest.mark.parametrize("reward_class", [MetagradientReward, NaiveReward])


class TestMetagradient:
    @pytest.mark.parametrize("optim", ["adamw", "sgd"])
    def test_is_one_run_for_each_rollout_index(self, make, call, log, examples, optim):
        args = recipe(optim=optim)
        reward = make(MetagradientReward, args=args)
        rewards = call(reward, TEXTS, **log.hooks)
        raw, outs = np.empty(6), []
        for rows in DATASETS:
            outs.append(compute_metagradients(reward.target_model, [examples[i] for i in rows], LMHeadNorm(), args))
            raw[rows] = outs[-1].metagradients.double()
        assert log.columns == {"metagradient_raw": raw.tolist()}
        assert rewards == pytest.approx(standardized(raw))
        assert np.std([rewards[i] for i in DATASETS[0]]) != pytest.approx(1)  # over the batch, not over a dataset
        expected = {
            "mean": raw.mean(),
            "std": raw.std(),
            "metric_before": outs[0].metric_before,
            "metric_after": fmean(out.metric_after for out in outs),
            "metric_gain": fmean(out.metric_after - out.metric_before for out in outs),
            "target_loss": fmean(loss for out in outs for loss in out.losses),
            "lm_head_norm": fmean(out.readouts["lm_head_norm"] for out in outs),
            "truncated": 6,
        }
        assert {name: log.metrics[name] for name in expected} == pytest.approx(expected)
        assert len({out.metric_after for out in outs}) == 3

    def test_differs_from_one_run_on_all(self, make, causal_lm, tokenizer, call):
        whole = MetagradientReward(
            causal_lm(seed=1), LMHeadNorm(), recipe(), processing_class=tokenizer, num_generations=3
        )
        assert call(make(MetagradientReward), TEXTS) != pytest.approx(call(whole, TEXTS), rel=1e-3)

    def test_auto_epsilon_root_is_that_of_the_first_dataset(self, make, call, log, examples):
        args = recipe(adam_epsilon_root="auto")
        reward = make(MetagradientReward, args=args)
        call(reward, TEXTS, **log.hooks)
        first = compute_metagradients(reward.target_model, [examples[i] for i in DATASETS[0]], LMHeadNorm(), args)
        root = first.adam_epsilon_root
        assert reward.args.adam_epsilon_root == log.metrics["adam_epsilon_root"] == root
        frozen = make(MetagradientReward, args=recipe(adam_epsilon_root=root))
        assert call(frozen, TEXTS) == call(make(MetagradientReward, args=args), TEXTS) == call(reward, TEXTS)

    def test_dataset_of_empty_completions(self, make, call, log, examples):
        reward = make(MetagradientReward)
        call(reward, [TEXTS[0], "", TEXTS[2], TEXTS[3], "sun", TEXTS[5]], **log.hooks)
        raw = log.columns["metagradient_raw"]
        assert raw[1] == raw[4] == 0.0 and all(raw[i] != 0 for i in (0, 2, 3, 5))
        assert log.metrics["empty"] == 2
        outs = [
            compute_metagradients(reward.target_model, [examples[i] for i in rows], LMHeadNorm(), recipe())
            for rows in (DATASETS[0], DATASETS[2])
        ]
        assert log.metrics["metric_after"] == pytest.approx(fmean(out.metric_after for out in outs))

    def test_one_nonfinite_metagradient(self, make, call, log):
        class Broken(MetagradientReward):
            def run_each(self, *args):
                outs = super().run_each(*args)
                outs[0].metagradients[1] = float("nan")
                return outs

        rewards = call(make(Broken), TEXTS, **log.hooks)
        assert [reward is None for reward in rewards] == [False, False, False, True, False, False]
        assert log.metrics["nonfinite"] == 1

    @pytest.mark.parametrize(("tolerance", "fallbacks"), [(0.0, 6), (1.0, 0)])  # three runs of two steps
    def test_central_differences_are_logged(self, make, call, log, tolerance, fallbacks):
        args = recipe(curvature="central_difference", curvature_tolerance=tolerance)
        call(make(MetagradientReward, args=args), TEXTS, **log.hooks)
        assert log.metrics["exact_fallbacks"] == fallbacks
        assert (log.metrics["curvature_error"] > 0) == (fallbacks == 0)

    def test_needs_the_number_of_generations(self, make):
        with pytest.raises(ValueError, match="`cross_group_batching=False` needs `num_generations`"):
            make(MetagradientReward, num_generations=None)


class TestNaive:
    @pytest.mark.parametrize("fields", [{}, {"optim": "sgd"}, {"batch_size": 8, "num_train_epochs": 2}])
    def test_is_the_metric_of_each_dataset(self, make, call, log, examples, fields):
        args = recipe(**fields)
        reward = make(NaiveReward, args=args)
        rewards = call(reward, TEXTS, **log.hooks)
        after = [
            train_and_measure(reward.target_model, [examples[i] for i in rows], LMHeadNorm(), args)
            for rows in DATASETS
        ]
        losses = [fmean(out.losses) for out in after]
        after = [out.metric_after for out in after]
        assert len(set(after)) == 3
        before = LMHeadNorm()(reward.target_model).item()
        gains = [value - before for value in after]
        assert log.columns == {"naive_raw": gains * 2}
        assert rewards == pytest.approx(standardized(gains * 2))
        assert rewards[:3] == rewards[3:]
        expected = {
            "mean": fmean(gains),
            "std": np.std(gains),
            "min": min(gains),
            "max": max(gains),
            "metric_before": before,
            "metric_after": fmean(after),
            "metric_gain": fmean(after) - before,
            "lm_head_norm": -fmean(after),
            "target_loss": fmean(losses),
            "adam_epsilon_root": 1e-6,
            "nonfinite": 0,
            "empty": 0,
            "truncated": 6,
            "cut": 0,
        }
        assert log.metrics.pop("seconds") > 0
        assert log.metrics == pytest.approx(expected)

    def test_auto_epsilon_root_is_measured_once(self, make, call, log, examples):
        args = recipe(adam_epsilon_root="auto", batch_size=2)
        reward = make(NaiveReward, args=args)
        call(reward, TEXTS, **log.hooks)
        data = [[examples[i] for i in rows] for rows in DATASETS]
        root = compute_metagradients(reward.target_model, data[0], LMHeadNorm(), args).adam_epsilon_root
        assert reward.args.adam_epsilon_root == log.metrics["adam_epsilon_root"] == pytest.approx(root, rel=1e-6)
        frozen = recipe(adam_epsilon_root=reward.args.adam_epsilon_root, batch_size=2)
        outs = [train_and_measure(reward.target_model, rows, LMHeadNorm(), frozen) for rows in data]
        assert log.columns["naive_raw"] == [out.metric_after - out.metric_before for out in outs] * 2
        call(reward, TEXTS[::-1], **log.hooks)
        assert log.metrics["adam_epsilon_root"] == frozen.adam_epsilon_root

    def test_auto_epsilon_root_is_that_of_the_first_batch(self, make, call, examples):
        """Of several steps and epochs: the gradient of the first, whose batch the shuffle chooses."""
        args = recipe(adam_epsilon_root="auto", num_train_epochs=2)
        reward = make(NaiveReward, args=args)
        call(reward, TEXTS)
        first = next(args.batches(2))
        data = [[examples[i] for i in DATASETS[0]][j] for j in first]
        whole = compute_metagradients(reward.target_model, data, LMHeadNorm(), recipe(adam_epsilon_root="auto"))
        assert reward.args.adam_epsilon_root == pytest.approx(whole.adam_epsilon_root, rel=1e-6)

    def test_scale_of_the_metric_is_that_of_the_first_dataset(self, make, call, examples):
        args = recipe(adam_epsilon_root="auto")
        reward = make(NaiveReward, metric=LMHeadPattern([[1, -1], [-1, 1]], scale="auto"), args=args)
        call(reward, TEXTS)
        other = LMHeadPattern([[1, -1], [-1, 1]], scale="auto")
        train_and_measure(reward.target_model, [examples[i] for i in DATASETS[0]], other, reward.args)
        assert reward.metric.scale_value == other.scale_value is not None

    def test_readouts_are_of_the_fine_tuned_target(self, make, call, log):
        calls = []

        class Metric:
            def __call__(self, model):
                return -model.lm_head.weight.norm()

            def readouts(self, model):
                calls.append(model.lm_head.weight.norm().item())
                return {"norm": calls[-1]}

        reward = make(NaiveReward, metric=Metric())
        call(reward, TEXTS, **log.hooks)
        assert len(calls) == 3
        assert log.metrics["norm"] == pytest.approx(fmean(calls)) == pytest.approx(-log.metrics["metric_after"])

    def test_metric_without_setup_and_readouts(self, make, call):
        assert len(call(make(NaiveReward, metric=lambda model: -model.lm_head.weight.norm()), TEXTS)) == 6

    def test_empty_completions(self, make, call, log):
        """One in a dataset has the dataset's gain; a dataset of nothing else has gained nothing."""
        reward = make(NaiveReward)
        rewards = call(reward, ["", "", TEXTS[2], TEXTS[3], "sun", TEXTS[5]], **log.hooks)
        raw = log.columns["naive_raw"]
        assert raw[:3] == raw[3:] and rewards[:3] == rewards[3:]
        assert raw[1] == 0
        assert log.metrics["metric_before"] == LMHeadNorm()(reward.target_model).item()
        assert log.metrics["metric_gain"] == pytest.approx(fmean([raw[0], raw[2]]))
        assert log.metrics["empty"] == 3

    def test_number_of_generations_is_not_optional(self, causal_lm, tokenizer):
        with pytest.raises(TypeError, match="num_generations"):
            NaiveReward(causal_lm(), LMHeadNorm(), recipe(), tokenizer)

    def test_metric_that_is_no_scalar(self, make, call):
        with pytest.raises(ValueError, match="`metric` must return a scalar tensor"):
            call(make(NaiveReward, metric=lambda model: model.lm_head.weight), TEXTS)

    def test_metric_that_is_not_finite(self, make, call):
        with pytest.raises(FloatingPointError, match="`metric` returned nan"):
            call(make(NaiveReward, metric=lambda model: model.lm_head.weight.sum() * math.nan), TEXTS)


class TestBoth:
    @both
    def test_seed_follows_the_step_and_is_one_for_all_datasets(self, make, call, reward_class):
        seeds = []

        class Recording(reward_class):
            def run_each(self, run, *args):
                def recorded(model, examples, metric, args, accelerator):
                    seeds.append(args.seed)
                    return run(model, examples, metric, args, accelerator=accelerator)

                return super().run_each(recorded, *args)

        call(make(Recording), TEXTS, trainer_state=SimpleNamespace(global_step=4))
        assert seeds == [7, 7, 7]

    @both
    def test_target_and_random_state_are_as_before(self, make, call, weights, reward_class):
        reward = make(reward_class, args=recipe(adam_epsilon_root="auto"))
        before, state = weights(reward.target_model), torch.get_rng_state()
        call(reward, TEXTS)
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(reward.target_model).items())
        assert torch.equal(state, torch.get_rng_state())

    @both
    def test_batch_that_cannot_be_split(self, make, call, reward_class):
        with pytest.raises(ValueError, match="batch of 5 completions cannot be split .*`num_generations`.* is 3"):
            call(make(reward_class), TEXTS[:5])

    @both
    def test_groups_of_another_size(self, make, call, reward_class):
        """As where a stock trainer has another `num_generations` than the reward: the number of rows would fit."""
        prompts = ["a", "a", "b", "b", "c", "c"]
        with pytest.raises(ValueError, match="does not hold 3 completions of each prompt"):
            call(make(reward_class), TEXTS, prompts=prompts)

    @both
    def test_nothing_to_train_on(self, make, call, reward_class):
        with pytest.raises(ValueError, match="All 3 completions are empty or one token long"):
            call(make(reward_class), ["", "sun", ""])

    @both
    def test_equal_completions(self, make, call, reward_class):
        with pytest.warns(UserWarning, match="All completions of this generation batch have the same value"):
            assert call(make(reward_class, args=recipe(batch_size=2)), ["the red sun"] * 6) == [0.0] * 6

    @both
    def test_rounding_is_no_difference(self, make, call, reward_class):
        """Kernels may round rows of a batch differently, and processors sums."""

        class Rounding(reward_class):
            def measure(self, *args):
                return -0.3 * (1 + 2e-7 * torch.arange(6, dtype=torch.float64).remainder(3)), {}

        reward = make(Rounding)
        with pytest.warns(UserWarning, match="have the same value"):
            assert call(reward, TEXTS) == [0.0] * 6
        assert reward.largest_std == 0.0

    @both
    def test_state_is_taken_up(self, make, call, reward_class):
        first = make(reward_class, args=recipe(adam_epsilon_root="auto"))
        call(first, TEXTS)
        second = make(reward_class, args=recipe(adam_epsilon_root="auto"))
        second.load_state(first.state())
        assert second.state() == first.state()
        assert second.largest_std == first.largest_std > 0
        assert second.args == first.args

    def test_state_of_another_reward(self, make, call):
        """Standard deviations of metrics and of metagradients are in different units."""
        first, second = make(MetagradientReward), make(NaiveReward)
        call(first, TEXTS)
        second.load_state(first.state())
        assert second.largest_std == 0.0

    @both
    def test_stock_trainer(self, make, make_grpo_trainer, reward_class):
        reward = make(reward_class, num_generations=4, args=recipe(batch_size=2))
        trainer = make_grpo_trainer(reward)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "reward" in row]
        assert len(rows) == 2
        for row in rows:
            assert row[f"{reward.__name__}/metric_after"] != row[f"{reward.__name__}/metric_before"]
