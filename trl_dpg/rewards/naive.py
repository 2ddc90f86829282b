"""The reward of whole datasets: all completions of a dataset get the gain of the metric from training on it."""

import torch
from torch import Tensor

from ..metagradients import train_and_measure
from .base import TargetReward, mean_figures


class NaiveReward(TargetReward):
    r"""
    Reward of a completion: how much fine-tuning the target on the completion's dataset improved the metric.

    This baseline shows what metagradients add. The generation batch is split by rollout index into `num_generations`
    datasets of one completion per prompt. The target is fine-tuned on each of them, from its original weights and by the
    same recipe, without derivatives. All completions of a dataset get the same gain of the metric. Values are standardized over the
    batch as in [`MetagradientReward`]. Gains go into the logs (`naive/mean` is their mean over datasets, `naive/std` their standard
    deviation), and as column `naive_raw` into the completions table.

    An empty completion is not trained on, but gets the gain of its dataset. A dataset of empty completions alone has the gain 0.

    [`DatasetPolicyGradientTrainer`] takes advantages over the whole batch, because the reward does not compare the completions of one
    prompt. TRL's own [`~trl.GRPOTrainer`] takes them over each prompt's group.

    Args:
        *args, **kwargs:
            As in [`MetagradientReward`], from the target to the EOS tokens. `adam_epsilon_root="auto"` is measured on the
            first dataset. The shuffle is the same for every dataset.
        num_generations (`int`):
            The trainer's number of completions per prompt.
    """

    __name__ = "naive"

    def __init__(self, *args, num_generations: int, **kwargs):
        super().__init__(*args, num_datasets=num_generations, **kwargs)

    def measure(self, examples, datasets, args, processes) -> tuple[Tensor, dict[str, float]]:
        outs = self.run_each(train_and_measure, examples, datasets, args, processes)
        figures = mean_figures(outs.values())
        # Gains instead of levels of the metric: differences that are tiny beside a large level would count as rounding.
        gains = {number: out.metric_after - out.metric_before for number, out in outs.items()}
        raw = [gains.get(i % self.num_datasets, 0.0) for i in range(len(examples))]
        return torch.tensor(raw, dtype=torch.float64), figures
