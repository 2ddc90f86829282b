"""Same seed, same run; and the reward neither reads nor changes the global random state."""

import random

import numpy as np
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_dpg import MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments
from trl_dpg.metrics import LMHeadNorm
from trl_dpg.testing import tiny_prompts


def test_same_seed_same_run_and_other_seed_other_run(make_trainer, causal_lm, weights):
    ends = []
    for seed in (3, 3, 4):
        trainer = make_trainer(seed=seed, learning_rate=1e-3, target_batch_size=4, eval_strategy="steps", eval_steps=1)
        trainer.train()
        clocks = ("seconds", "runtime", "per_second", "step_time")
        log = [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in trainer.state.log_history]
        ends.append((weights(trainer.model), log))
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    assert ends[0][1] == ends[1][1]
    assert any(not torch.equal(ends[0][0][name], ends[2][0][name]) for name in ends[0][0])


def states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def test_completions_are_those_of_a_run_without_metagradients(make_grpo_trainer, causal_lm, tokenizer):
    """Beside a reward that draws nothing, a stock trainer generates the same whether metagradients are computed or not."""
    written = []

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            written[-1].append((list(trainer._logs["completion"]), states()))

    for with_it in (False, True):
        written.append([])
        rewards = [lambda completions, **kwargs: [float(len(text)) for text in completions]]
        if with_it:
            recipe = TargetTrainingArguments(learning_rate=1e-3, batch_size=4, adam_epsilon_root="auto")
            rewards.append(MetagradientReward(causal_lm(seed=1), LMHeadNorm(), recipe, tokenizer))
        trainer = make_grpo_trainer(
            rewards, max_steps=3, learning_rate=1e-3, reward_weights=[1.0, 0.0][: len(rewards)]
        )
        trainer.add_callback(Collect())
        trainer.train()
    for (completions, before), (others, after) in zip(*written, strict=True):
        assert completions == others
        assert before[0] == after[0] and torch.equal(before[2], after[2])
        assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert len({tuple(completions) for completions, _ in written[0]}) == 3


def test_first_batch_of_ours_is_that_of_grpo(make_trainer, make_grpo_trainer, causal_lm, tokenizer):
    """The whole trainer, target, validation and report included, against TRL's with a constant reward."""
    completions = []
    prompts = tiny_prompts(16, 1)["train"]

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            completions.append(list(trainer._logs["completion"]))

    trainer: GRPOTrainer = make_trainer(train_dataset=prompts, eval_dataset=None, max_steps=1, seed=5)
    trainer.add_callback(Collect())
    trainer.train()
    trainer = make_grpo_trainer(lambda completions, **kwargs: [1.0] * len(completions), prompts, max_steps=1, seed=5)
    trainer.add_callback(Collect())
    trainer.train()
    assert completions[0] == completions[1]
