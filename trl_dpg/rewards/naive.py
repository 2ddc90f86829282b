"""The dataset-level baseline: completions are rewarded with what the target became on their whole dataset."""

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..metagradients import TargetTrainingArguments, train_and_measure
from .base import TargetReward, mean_figures


class NaiveReward(TargetReward):
    r"""
    Reward of a completion: how much fine-tuning the target on its dataset improved the metric.

    The baseline that a metagradient is to beat. The generation batch is split by rollout index into `num_generations`
    datasets of one completion per prompt. The target is fine-tuned on each of them, from its original weights and by the
    same recipe, without derivatives; all completions of a dataset get its gain of the metric. Values are standardized over the batch
    as in [`MetagradientReward`]. The gain goes into the logs (`naive/mean` is the mean over datasets,
    `naive/std` its deviation) and, as column `naive_raw`, into the completions table.

    An empty completion has no part in its dataset's run, but gets its gain; a dataset of nothing else has gained nothing.

    [`DatasetPolicyGradientTrainer`] takes the advantage over the whole batch, as the reward says nothing about a prompt's
    completions among each other. A stock [`~trl.GRPOTrainer`] takes it over each prompt's group.

    Args:
        *args, **kwargs:
            As of [`MetagradientReward`], from the target to the EOS tokens. `adam_epsilon_root="auto"` is measured on the
            first dataset; the shuffle is the same for every dataset.
        num_generations (`int`):
            The trainer's number of completions per prompt.
    """

    __name__ = "naive"

    def __init__(self, *args, num_generations: int, **kwargs):
        super().__init__(*args, num_datasets=num_generations, **kwargs)

    def measure(
        self,
        examples: list[dict[str, Any]],
        datasets: list[list[int]],
        args: TargetTrainingArguments,
        processes: PartialState,
    ) -> tuple[Tensor, dict[str, float]]:
        outs = self.run_each(train_and_measure, examples, datasets, args, processes)
        figures = mean_figures(outs.values())
        # Gains, not levels: beside a large level, what the datasets differ in would count as rounding.
        gains = {number: out.metric_after - out.metric_before for number, out in outs.items()}
        raw = [gains.get(i % self.num_datasets, 0.0) for i in range(len(examples))]
        return torch.tensor(raw, dtype=torch.float64), figures
