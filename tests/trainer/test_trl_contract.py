"""What the package relies on in TRL and Transformers, checked against the stock trainer."""

import inspect
import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOTrainer

from trl_dpg import DatasetPolicyGradientTrainer
from trl_dpg.testing import tiny_prompts


class RecordingReward:
    """Keeps what it is called with, and returns each completion's place in the batch."""

    __name__ = "recording"

    def __init__(self, rewards=None):
        self.rewards = rewards
        self.calls = []
        self.modes = []

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        self.modes.append(
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        )
        return self.rewards or [float(i) for i in range(len(kwargs["prompts"]))]


@pytest.fixture
def reward():
    return RecordingReward()


class TestReward:
    def test_arguments(self, reward, make_grpo_trainer, tokenizer):
        prompts = tiny_prompts(4, 1)["train"]["prompt"]
        dataset = Dataset.from_dict({"prompt": prompts, "topic": [f"about {prompt}" for prompt in prompts]})
        trainer = make_grpo_trainer(reward, dataset, max_steps=1)
        trainer.train()
        (call,) = reward.calls
        names = {"prompts", "completions", "completion_ids", "topic", "trainer_state", "log_extra", "log_metric"}
        assert set(call) == names
        assert len(call["prompts"]) == len(call["completions"]) == len(call["completion_ids"]) == 8
        assert set(call["prompts"]) <= set(prompts)
        assert call["topic"] == [f"about {prompt}" for prompt in call["prompts"]]
        for text, ids in zip(call["completions"], call["completion_ids"], strict=True):
            assert isinstance(ids, list) and all(type(token) is int for token in ids)
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert call["trainer_state"] is trainer.state

    def test_trainer_state_counts_steps(self, make_grpo_trainer):
        steps = []

        def reward(trainer_state, completions, **kwargs):
            steps.append(trainer_state.global_step)
            return [0.0] * len(completions)

        make_grpo_trainer(reward, max_steps=3).train()
        assert steps == [0, 1, 2]

    @pytest.mark.parametrize(
        ("config", "num_calls", "size"),
        [
            ({}, 4, 8),
            ({"gradient_accumulation_steps": 2}, 4, 16),
            ({"steps_per_generation": 2}, 2, 16),
            ({"generation_batch_size": 16}, 2, 16),
            ({"num_iterations": 2}, 2, 8),
            ({"gradient_accumulation_steps": 2, "num_iterations": 2}, 2, 16),
            ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2, 32),
        ],
    )
    def test_called_once_per_generation_batch(self, reward, make_grpo_trainer, config, num_calls, size):
        trainer = make_grpo_trainer(reward, max_steps=4, **config)
        trainer.train()
        assert trainer.state.global_step == 4
        assert [len(call["prompts"]) for call in reward.calls] == [size] * num_calls
        assert trainer.args.generation_batch_size == size

    @pytest.mark.parametrize("config", [{}, {"bf16": True, "gradient_checkpointing": True}])
    def test_gradients_are_on_and_autocast_is_off(self, reward, make_grpo_trainer, config):
        make_grpo_trainer(reward, max_steps=1, **config).train()
        assert reward.modes == [(True, False, False)]

    def test_completions_of_a_prompt_are_contiguous(self, reward, make_grpo_trainer):
        make_grpo_trainer(reward, gradient_accumulation_steps=2).train()
        for call in reward.calls:
            groups = [call["prompts"][i : i + 4] for i in range(0, 16, 4)]
            assert all(len(set(group)) == 1 for group in groups)
            assert len({group[0] for group in groups}) == 4

    def test_order_of_rewards_is_that_of_advantages(self, make_grpo_trainer):
        reward = RecordingReward([3.0, 1.0, 2.0, 6.0, -10.0, 0.0, 10.0, 0.0])
        trainer = make_grpo_trainer(reward, max_steps=1, scale_rewards="none")
        trainer.train()
        assert list(trainer._logs["rewards"]["recording"]) == reward.rewards
        assert list(trainer._logs["advantages"]) == [0.0, -2.0, -1.0, 3.0, -10.0, 0.0, 10.0, 0.0]

    def test_batch_scale_is_one_for_all_prompts(self, make_grpo_trainer):
        reward = RecordingReward([3.0, 1.0, 2.0, 6.0, -10.0, 0.0, 10.0, 0.0])
        trainer = make_grpo_trainer(reward, max_steps=1, scale_rewards="batch")
        trainer.train()
        scale = torch.tensor(reward.rewards).std().item() + 1e-4
        expected = [advantage / scale for advantage in [0.0, -2.0, -1.0, 3.0, -10.0, 0.0, 10.0, 0.0]]
        assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-6)

    def test_none_has_no_advantage_and_is_in_no_baseline(self, make_grpo_trainer):
        reward = RecordingReward([None, 1.0, 2.0, 6.0, 0.0, 0.0, 1.0, 3.0])
        trainer = make_grpo_trainer(reward, max_steps=1, scale_rewards="none")
        trainer.train()
        assert list(trainer._logs["advantages"]) == [0.0, -2.0, -1.0, 3.0, -1.0, -1.0, 0.0, 2.0]

    def test_rewards_and_advantages_pass_through_these_methods(self, make_grpo_trainer):
        """Which is where the trainer takes the ones and replaces the others."""
        rewards, outputs = [], []

        class Recorder(GRPOTrainer):
            def _calculate_rewards(self, *args, **kwargs):
                rewards.append(super()._calculate_rewards(*args, **kwargs))
                return rewards[-1]

            def _generate_and_score_completions(self, inputs):
                outputs.append((len(inputs), super()._generate_and_score_completions(inputs)))
                return outputs[-1][1]

        values = [3.0, 1.0, None, 6.0, -10.0, 0.0, 10.0, 0.0]
        trainer = make_grpo_trainer(RecordingReward(values), trainer_class=Recorder, max_steps=1)
        trainer.train()
        assert rewards[0].shape == (8, 1)
        assert rewards[0].isnan().flatten().tolist() == [value is None for value in values]
        ((size, output),) = outputs
        assert size == len(output["advantages"]) == 8
        assert output["advantages"].tolist() == list(trainer._logs["advantages"])

    def test_wrong_number_of_rewards_is_refused(self, make_grpo_trainer):
        with pytest.raises(ValueError, match="returned 3 rewards, but 8 were expected"):
            make_grpo_trainer(RecordingReward([1.0, 2.0, 3.0])).train()

    def test_log_extra_becomes_a_column_of_the_completions_table(self, make_grpo_trainer, tmp_path):
        def reward(completions, log_extra, **kwargs):
            log_extra("length", [len(completion) for completion in completions])
            return [0.0] * len(completions)

        make_grpo_trainer(reward, max_steps=1, log_completions=True).train()
        table = pd.read_parquet(tmp_path / "grpo" / "completions" / "completions_00001.parquet")
        assert len(table) == 8
        assert list(table["length"]) == [len(completion) for completion in table["completion"]]

    def test_log_metric_is_averaged_into_the_log(self, make_grpo_trainer):
        values = iter([1.0, 4.0])

        def reward(completions, log_metric, **kwargs):
            log_metric("metagradient/value", next(values))
            return [0.0] * len(completions)

        trainer = make_grpo_trainer(reward, logging_steps=2)
        trainer.train()
        assert [row["metagradient/value"] for row in trainer.state.log_history if "reward" in row] == [2.5]

    def test_name_is_read_from_the_object(self, reward, make_grpo_trainer):
        trainer = make_grpo_trainer(reward, max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["rewards/recording/mean"] == 3.5


class TestGeneration:
    def test_generate_returns_ids_second_and_completions_fourth(self, reward, make_grpo_trainer, tokenizer):
        trainer = make_grpo_trainer(reward)
        prompts = ["the red sun"] * 4 + ["six seven"] * 4
        prompt_ids, completion_ids, _, completions, *_ = trainer._generate(prompts)
        assert prompt_ids == tokenizer(prompts)["input_ids"]
        assert completions == tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        assert all(0 < len(ids) <= 6 for ids in completion_ids)
        assert prompts == ["the red sun"] * 4 + ["six seven"] * 4

    def test_conversational_completion_is_one_message(self, reward, make_grpo_trainer, chat_tokenizer):
        trainer = make_grpo_trainer(reward, processing_class=chat_tokenizer)
        prompts = [[{"role": "user", "content": "the red sun"}]] * 4
        _, completion_ids, _, completions, *_ = trainer._generate(prompts)
        texts = chat_tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        assert completions == [[{"role": "assistant", "content": text}] for text in texts]

    def test_eos_is_in_the_ids_and_not_in_the_text(self, reward, make_grpo_trainer, tokenizer):
        others = [token for token in range(64) if token != tokenizer.eos_token_id]
        trainer = make_grpo_trainer(reward, generation_kwargs={"suppress_tokens": others})
        _, completion_ids, _, completions, *_ = trainer._generate(["the red sun"] * 4)
        assert completion_ids == [[tokenizer.eos_token_id]] * 4
        assert completions == [""] * 4

    def test_tokens_that_end_a_completion(self, reward, make_grpo_trainer, tokenizer, causal_lm):
        assert make_grpo_trainer(reward, processing_class=tokenizer).eos_token_ids == [tokenizer.eos_token_id]
        model = causal_lm()
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, 5]
        trainer = make_grpo_trainer(reward, model=model, processing_class=tokenizer)
        assert trainer.eos_token_ids == [tokenizer.eos_token_id, 5]
        assert trainer._tokenizer is tokenizer
        suppressed = [token for token in range(64) if token not in (5, 6)]
        trainer.generation_config.suppress_tokens = suppressed
        _, completion_ids, *_ = trainer._generate(["the red sun"] * 8)
        assert all(ids[-1] == 5 or len(ids) == 6 for ids in completion_ids)
        assert all(token == 6 for ids in completion_ids for token in ids[:-1])


class TestEvaluation:
    def test_evaluate_calls_evaluation_loop(self, reward, make_grpo_trainer):
        calls = []

        class Recorder(GRPOTrainer):
            def evaluation_loop(self, *args, **kwargs):
                calls.append((args, kwargs))
                batches.extend(args[0])
                return EvalLoopOutput(None, None, {"eval_metric": 1.0}, 12)

        batches = []
        trainer = make_grpo_trainer(reward, trainer_class=Recorder, num_generations_eval=2)
        prompts = tiny_prompts(1, 5)["test"]
        metrics = trainer.evaluate(prompts)
        ((args, kwargs),) = calls
        assert len(args) == 1 and isinstance(args[0], DataLoader)
        assert set(kwargs) == {"description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"}
        bound = inspect.signature(DatasetPolicyGradientTrainer.evaluation_loop).bind(trainer, *args, **kwargs)
        assert bound.arguments["metric_key_prefix"] == "eval"

        # rows of dicts, each prompt `num_generations_eval` times in a row, none left out
        rows = [row["prompt"] for batch in batches for row in batch]
        assert [len(batch) for batch in batches] == [8, 2]
        assert rows[::2] == rows[1::2]
        assert sorted(rows[::2]) == sorted(prompts["prompt"])
        assert len(args[0].dataset) == 5

        assert metrics["eval_metric"] == 1.0
        assert metrics["eval_samples_per_second"] > 0
        assert trainer.state.log_history[-1]["eval_metric"] == 1.0

    def test_signature(self):
        stock = inspect.signature(Trainer.evaluation_loop).parameters
        ours = inspect.signature(DatasetPolicyGradientTrainer.evaluation_loop).parameters
        assert list(ours) == list(stock)
        assert [p.default for p in ours.values()] == [p.default for p in stock.values()]
        assert "evaluation_loop" not in vars(GRPOTrainer)

    def test_prefix_of_several_datasets(self, reward, make_grpo_trainer):
        prefixes = []

        class Recorder(GRPOTrainer):
            def evaluation_loop(self, dataloader, description, metric_key_prefix="eval", **kwargs):
                prefixes.append(metric_key_prefix)
                return EvalLoopOutput(None, None, {f"{metric_key_prefix}_metric": 1.0}, 4)

        prompts = tiny_prompts(1, 4)["test"]
        trainer = make_grpo_trainer(reward, trainer_class=Recorder)
        metrics = trainer.evaluate({"near": prompts, "far": prompts})
        assert prefixes == ["eval_near", "eval_far"]
        assert {"eval_near_metric", "eval_far_metric"} <= set(metrics)


class TestModelCard:
    def test_stock_card_says_grpo(self, reward, make_grpo_trainer, tmp_path):
        make_grpo_trainer(reward).create_model_card("model")
        card = (tmp_path / "grpo" / "README.md").read_text()
        assert "trained with GRPO" in card and "2402.03300" in card

    def test_card_says_dpg(self, make_trainer, tmp_path):
        trainer = make_trainer()
        trainer.create_model_card("model")
        card = (tmp_path / "dpg" / "README.md").read_text()
        assert "trained with DPG" in card
        assert "Cite DPG as" in card
        assert "https://huggingface.co/papers/2604.08423" in card
        assert "Synthetic Data for any Differentiable Target" in card
        assert "- dpg" in card and "- trl" in card
        assert "grpo" not in card.lower() and "2402.03300" not in card
        assert set(trainer.model.model_tags) == {"trl", "dpg"}


class TestTrainerInternals:
    def test_reward_comes_first_and_is_a_plain_callable(self, make_trainer):
        trainer = make_trainer()
        assert trainer.reward_funcs == [trainer.target_training]
        assert trainer.reward_func_names == ["metagradient"]
        assert not isinstance(trainer.target_training, torch.nn.Module)
        assert not inspect.iscoroutinefunction(trainer.target_training.__call__)

    def test_eos_tokens_are_handed_to_the_reward(self, make_trainer, tokenizer):
        trainer = make_trainer()
        assert trainer.target_training.eos_token_ids == [tokenizer.eos_token_id, tokenizer.pad_token_id]

    def test_truncation_is_counted_as_trl_counts_it(self, make_trainer):
        suppressed = [token for token in range(64) if token not in (5, 6, 62)]  # ends after three tokens on average
        trainer = make_trainer(per_device_train_batch_size=32, generation_kwargs={"suppress_tokens": suppressed})
        trainer.train()
        rows = [row for row in trainer.state.log_history if "metagradient/truncated" in row]
        assert len(rows) == 2
        assert any(0 < row["metagradient/truncated"] < 32 for row in rows)
        for row in rows:
            assert math.isclose(row["metagradient/truncated"] / 32, row["completions/clipped_ratio"])
