"""What evaluation must not do to training, and what it may not be asked for."""

import pytest
from datasets import Dataset
from trl import GRPOTrainer

import trl_dpg.checks
from trl_dpg import MetagradientReward
from trl_dpg.data import completion_text
from trl_dpg.metagradients import TargetTrainingArguments
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.rewards import NaiveReward


PATTERN = [[1, -1], [-1, 1]]


class Recording(MetagradientReward):
    """Notes what is measured after each call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def __call__(self, *args, log_metric=None, **kwargs):
        rewards = super().__call__(*args, log_metric=log_metric, **kwargs)
        training = log_metric.__self__.model.training
        self.seen.append((training, self.args.adam_epsilon_root, self.metric.scale_value, self.largest_std))
        return rewards


@pytest.mark.parametrize("eval_on_start", [False, True])
def test_a_stock_trainer_measures_in_training_only(make_grpo_trainer, causal_lm, tokenizer, eval_on_start):
    """With evaluations in between, every training reward is as without them."""
    runs = {}
    for name, config in {
        "without": {},
        "with": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": eval_on_start},
    }.items():
        reward = Recording(
            causal_lm(seed=1), LMHeadPattern(PATTERN), TargetTrainingArguments(), tokenizer, eos_token_ids=[62]
        )
        prompts = Dataset.from_dict({"prompt": ["the red sun", "you ask"]})
        trainer = make_grpo_trainer(reward, max_steps=3, eval_dataset=prompts, **config)
        trainer.train()
        runs[name] = reward.seen
    trained = [row[1:] for row in runs["with"] if row[0]]
    evaluated = [row[1:] for row in runs["with"] if not row[0]]
    assert len(evaluated) == 3 + eval_on_start and len(trained) == 3
    assert evaluated[0] == (("auto", None, 0.0) if eval_on_start else trained[0])
    assert evaluated[eval_on_start:] == trained  # as the training batch before left it
    assert trained[0][0] != "auto" and trained[0][1] is not None
    if not eval_on_start:  # which draws random numbers, so that the texts of the first batch are others
        assert trained[0] == runs["without"][0][1:]


def test_our_trainer_measures_in_training_only(make_trainer):
    trainer = make_trainer(metric=LMHeadPattern(PATTERN), eval_strategy="steps", eval_steps=1, eval_on_start=True)
    scales = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: (evaluate(*args, **kwargs), scales.append(trainer.metric.scale_value))[
        0
    ]
    trainer.train()
    assert scales[0] is None and scales[1] is not None and len(set(scales[1:])) == 1


def test_another_number_of_generations_in_evaluation(make_grpo_trainer, causal_lm, tokenizer):
    reward = NaiveReward(
        causal_lm(seed=1), LMHeadPattern(PATTERN), processing_class=tokenizer, eos_token_ids=[62], num_generations=4
    )
    trainer = make_grpo_trainer(reward, num_generations_eval=2)
    assert isinstance(trainer, GRPOTrainer)
    trainer.model.eval()
    with pytest.raises(ValueError, match="does not hold 4 completions of each prompt.*`num_generations_eval`"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["the red sun", "a dog"] * 4}))


class Level:
    """A metric of a large level, beside which the datasets differ by little."""

    def __call__(self, model):
        return model.lm_head.weight.double()[:, 0].sum() + 1e9


def test_naive_rewards_do_not_vanish_beside_a_large_level(make_trainer):
    trainer = make_trainer(reward="naive", metric=Level(), max_steps=1)
    trainer.train()
    rewards = list(trainer._logs["rewards"]["naive"])
    assert len(set(rewards)) == 4 and max(abs(reward) for reward in rewards) > 0.5
    gains = list(trainer._logs["extra"]["naive_raw"])
    assert max(abs(gain) for gain in gains) < 1.0


def test_a_skipped_batch_has_no_raw_values(make_trainer):
    """The table of completions shows none, instead of those of the last batch."""
    trainer = make_trainer(nonfinite="skip", max_steps=2, log_completions=True)
    metric, calls = trainer.metric, []

    def sometimes(model):
        calls.append(1)
        return metric(model) * (float("nan") if trainer.state.global_step == 1 else 1.0)

    trainer.target_training.metric = sometimes
    metric.setup(trainer.target_training.target_model)
    trainer.train()
    assert list(trainer._logs["extra"]["metagradient_raw"]) == [None] * 8
    assert list(trainer._logs["extra"]["metagradient_credit"]) == [""] * 8


def test_share_of_steps_that_are_not_finite(make_trainer):
    trainer = make_trainer(nonfinite="skip", max_steps=4, logging_steps=4)
    training_step = trainer.training_step

    def broken(model, inputs, num_items_in_batch):
        loss = training_step(model, inputs, num_items_in_batch)
        if trainer.state.global_step == 2:
            next(model.parameters()).grad.fill_(float("inf"))
        return loss

    trainer.training_step = broken
    trainer.train()
    assert [row["nonfinite_steps"] for row in trainer.state.log_history if "nonfinite_steps" in row] == [0.25]


@pytest.mark.parametrize("stream", [False, True])
def test_predictions_are_in_the_order_of_the_prompts(make_trainer, tokenizer, stream):
    def repeat(prompts, trainer):
        ids = tokenizer(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": ids, "logprobs": None}

    texts = ["the red sun", "you ask", "the sun", "you", "red"]
    prompts = Dataset.from_dict({"prompt": texts})
    trainer = make_trainer(rollout_func=repeat, per_device_eval_batch_size=4)
    output = trainer.predict(prompts.to_iterable_dataset() if stream else prompts)
    assert output.predictions == [text for text in texts for _ in range(trainer.num_generations_eval)]


def test_evaluation_sets_that_cannot_be_used(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"`eval_dataset` has the columns \['text'\] but no `prompt`"):
        trainer.evaluate(Dataset.from_dict({"text": ["the red sun"] * 4}))
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        trainer.evaluate(Dataset.from_dict({"prompt": []}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "A generation batch has 2 prompts"),
        ({"target_batch_size": 16}, "`target_batch_size` is 16, but a run of the target has 8 examples"),
        (
            {"target_batch_size": 4, "cross_group_batching": False},
            "`target_batch_size` is 4, but a run of the target has 2 examples",
        ),
        ({"reward_language": "es"}, "`reward_language` 'es' has no effect, as `reward` is 'metagradient'"),
        (
            {"reference_texts": ["a dog"], "reward": "naive"},
            "`reference_texts` ['a dog'] has no effect, as `reward` is 'naive'",
        ),
        ({"per_device_train_batch_size": 16, "target_batch_size": 4}, "Validation fine-tunes the target for 3 steps"),
    ],
)
def test_warnings_that_help(make_trainer, caplog, fields, said):
    trl_dpg.checks.logger.warning_once.cache_clear()  # said once a process
    with caplog.at_level("WARNING", logger="trl_dpg"):
        trainer = make_trainer(**fields)
        if "Validation" in said:
            trainer.evaluate()
    assert said in caplog.text


def test_a_folder_of_another_run(make_trainer, caplog):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    with caplog.at_level("WARNING", logger="trl_dpg"):
        make_trainer(max_steps=1).train()
    assert "report of another run" in caplog.text


def test_the_text_is_what_the_assistant_wrote(make_trainer):
    """A tool's answer between two turns is not the generator's, so the target is not trained on it."""
    completion = [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]},
        {"role": "tool", "name": "add", "content": "42"},
        {"role": "assistant", "content": "the red sun"},
    ]
    assert completion_text(completion) == "the red sun"
