"""The dataset-level baseline: completions are rewarded with what the target became on their whole dataset."""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..metagradients import TargetTrainingArguments, compute_metagradients, train_and_measure
from ..metagradients.api import Metric
from ..metagradients.model import TargetModel, trainable_parameters
from .target import TargetReward


class NaiveReward(TargetReward):
    r"""
    Reward of a completion: the metric of a target that was fine-tuned on its dataset.

    The baseline that a metagradient is to beat. The generation batch is split by rollout index into `num_generations`
    datasets of one completion per prompt. The target is fine-tuned on each of them, from its original weights and by the
    same recipe, without derivatives; all completions of a dataset get its metric. Values are standardized over the batch
    as in [`MetagradientReward`]. The metric goes into the logs (`naive/metric_after` is the mean over datasets,
    `naive/std` its deviation) and, as column `naive_raw`, into the completions table.

    An empty completion has no part in its dataset's run, but gets its metric; a dataset of nothing else has that of the
    original target.

    [`DatasetPolicyGradientTrainer`] takes the advantage over the whole batch, as the reward says nothing about a prompt's
    completions among each other. A stock [`~trl.GRPOTrainer`] takes it over each prompt's group.

    Args:
        target_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to fine-tune, or its id or directory (loaded in float32). Its weights are the same after every call.
        metric (`Callable`):
            Metric of the fine-tuned target, higher is better. See [`~trl_dpg.metrics`].
        args ([`~trl_dpg.metagradients.TargetTrainingArguments`], *optional*):
            Recipe of the fine-tuning run. By default `adam_epsilon_root` is `"auto"`, which is measured on the first
            batch of the first dataset and then kept. The shuffle's seed is `seed` plus the trainer's global step, the same
            for every dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. Loaded from the target's name if `None`.
        formatting_func (`Callable`, *optional*):
            Maps `{"prompt": ..., "completion": ...}` to the text that the target is trained on, as in
            [`~trl.SFTTrainer`]. By default it is the completion's text alone.
        eos_token_ids (`list[int]`, *optional*):
            The *generator's* tokens that end a completion. Defaults to the EOS token of `processing_class`.
        num_generations (`int`):
            The trainer's number of completions per prompt.
    """

    __name__ = "naive"

    def __init__(
        self,
        target_model: str | PreTrainedModel | PeftModel,
        metric: Metric,
        args: TargetTrainingArguments | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        eos_token_ids: list[int] | None = None,
        *,
        num_generations: int,
    ):
        super().__init__(
            target_model, metric, args, processing_class, formatting_func, eos_token_ids, num_datasets=num_generations
        )

    def measure(
        self,
        examples: list[dict[str, Any]],
        datasets: list[list[int]],
        args: TargetTrainingArguments,
        processes: PartialState,
    ) -> tuple[Tensor, dict[str, float]]:
        after: dict[int, float] = {}
        readouts = []
        for j, dataset in enumerate(datasets):
            if not dataset:
                continue
            data = [examples[i] for i in dataset]
            if args.adam_epsilon_root == "auto":
                args = replace(args, adam_epsilon_root=self._measure_epsilon_root(data, args, processes))
            metric = _Recorder(self.metric)
            after[j] = train_and_measure(self.target_model, data, metric, args, accelerator=processes)
            readouts.append(metric.last_readouts)
        before = float(metric.values[0])
        raw = [after.get(i % self.num_datasets, before) for i in range(len(examples))]
        return torch.tensor(raw, dtype=torch.float64), {
            "metric_before": before,
            "metric_after": fmean(after.values()),
            "metric_gain": fmean(after.values()) - before,
            "adam_epsilon_root": float(args.adam_epsilon_root),
            **{name: fmean(row[name] for row in readouts) for name in readouts[0]},
        }

    def _measure_epsilon_root(
        self, data: list[dict[str, Any]], args: TargetTrainingArguments, processes: PartialState
    ) -> float:
        first = [data[i] for i in next(args.batches(len(data)))]

        def other(model: TargetModel) -> Tensor:  # not the metric, which may measure a scale in its first run
            return torch.stack([p.float().square().sum() for p in trainable_parameters(model)]).sum()

        once = replace(args, num_train_epochs=1)
        return compute_metagradients(self.target_model, first, other, once, processes).adam_epsilon_root


class _Recorder:
    """A metric that keeps its values before and after a run, and the read-outs after it."""

    def __init__(self, metric: Metric):
        self.metric = metric
        self.values: list[Tensor] = []
        self.last_readouts: dict[str, float] = {}
        if hasattr(metric, "setup"):
            self.setup = metric.setup

    def __call__(self, model: nn.Module) -> Tensor:
        value = self.metric(model)
        self.values.append(value)
        if len(self.values) == 2 and hasattr(self.metric, "readouts"):
            self.last_readouts = dict(self.metric.readouts(model))
        return value
