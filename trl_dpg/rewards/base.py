"""Base class of rewards that fine-tune the target."""

import inspect
import logging
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerState

from ..credit.advantages import ROUNDING
from ..data import Messages, indices_to_train_on
from ..fine_tuning import TargetFineTuning, measuring_nothing
from ..metagradients import TargetTrainingArguments, TrainingOutput
from ..metagradients.runtime.processes import failing_together


logger = logging.getLogger(__name__)

STD_FLOOR = 0.05  # least divisor of rewards, as a share of the largest standard deviation so far

Output = TypeVar("Output", bound=TrainingOutput)


class TargetReward(TargetFineTuning, ABC):
    """
    Base class of rewards that fine-tune the target on the generation batch, as one dataset or split by rollout index.

    Subclasses define `measure`, which gives each example a value. This class gathers the examples of all processes, standardizes the
    values and logs them.

    Args:
        num_datasets (`int`, *optional*, defaults to `1`):
            Number of datasets that a generation batch is split into. Row i belongs to dataset `i % num_datasets`.
        nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do if a loss, gradient or metric of the target's run is not finite. `"raise"` raises a [`FloatingPointError`].
            `"skip"` skips the batch: all its rewards are 0, and `skipped` is `True` until the next batch.
        **kwargs:
            Arguments of [`~trl_dpg.fine_tuning.TargetFineTuning`].
    """

    __name__: str  # name of the reward in TRL's logs

    def __init__(self, *args, num_datasets: int = 1, nonfinite: str = "raise", **kwargs):
        super().__init__(*args, **kwargs)
        self.num_datasets = num_datasets
        self.nonfinite = nonfinite
        self.largest_std = 0.0
        self.texts: list[str] = []  # texts of the last generation batch
        self._real: list[list[dict[str, Any]]] = []  # real examples for each dataset of this generation batch

    @abstractmethod
    def measure(
        self,
        examples: list[dict[str, Any]],
        datasets: list[list[int]],
        args: TargetTrainingArguments,
        processes: PartialState,
    ) -> tuple[Tensor, dict[str, float]]:
        """
        Returns values of the generation batch's examples in float64, and figures to log. Called for each variant of the recipe.

        Args:
            examples (`list[dict]`): Results of [`~TargetReward.examples_to_measure`] on all processes.
            datasets (`list[list[int]]`): Indices of the examples in each dataset, without those that cannot be trained on.
            args ([`~trl_dpg.metagradients.TargetTrainingArguments`]): Recipe of this step.
            processes ([`~accelerate.PartialState`]): Processes that share the work. Each of them makes this call.
        """

    def __call__(
        self,
        prompts: list[str | Messages],
        completions: list[str | Messages],
        completion_ids: list[list[int]],
        trainer_state: TrainerState | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """
        Returns the rewards of this process's completions, standardized. TRL makes this call on every process.

        Args:
            prompts, completions (`list[str]` or `list[list[dict]]`): One prompt per completion, and the completions.
            completion_ids (`list[list[int]]`): The completions in the generator's tokens.
            trainer_state ([`~transformers.TrainerState`], *optional*): Its global step is added to the seed of the shuffle.
            log_extra (`Callable`, *optional*): TRL's hook for columns of the completions table.
            log_metric (`Callable`, *optional*): TRL's hook for scalars.
        """
        start_time = time.perf_counter()
        with self._learning_nothing_in_evaluation(log_metric):
            local = self._local_examples(prompts, completions, completion_ids)
            examples, mine = self._gathered(local, prompts)
            self.texts = [example["text"] for example in examples]
            self._warn_of_texts(examples)
            try:
                values, figures = self._values(examples, trainer_state)
            except FloatingPointError as error:  # raised on every process
                self._skip_or_raise(error, trainer_state)
                self._log([None] * len(local), {"skipped": 1.0}, log_extra, log_metric)
                return [0.0] * len(local)
            rewards, of_values = self._standardized(values)
        figures = {**of_values, **self._counts(examples), **figures}
        if self.nonfinite == "skip":
            figures["skipped"] = 0.0
        figures["seconds"] = time.perf_counter() - start_time
        raw = values[mine].tolist()
        self._log(raw, figures, log_extra, log_metric)
        return [
            reward if math.isfinite(value) else None for reward, value in zip(rewards[mine].tolist(), raw, strict=True)
        ]

    def _log(self, raw: list, figures: dict[str, float], log_extra: Any, log_metric: Any) -> None:
        if log_extra is not None:
            log_extra(f"{self.__name__}_raw", raw)
        if log_metric is not None:  # TRL averages over processes, which all log the same value
            for name, value in figures.items():
                log_metric(f"{self.__name__}/{name}", value)

    @contextmanager
    def _learning_nothing_in_evaluation(self, log_metric: Any) -> Iterator[None]:
        """
        Discards what the reward measures during a trainer's evaluation.

        TRL does not tell a reward that it evaluates. But `log_metric` is a method of the trainer, whose model is then in eval mode.
        """
        trainer = log_metric.__self__ if inspect.ismethod(log_metric) else None
        if not isinstance(trainer, Trainer) or trainer.model.training:  # type: ignore[union-attr]
            yield
            return
        largest_std, skipped, args = self.largest_std, self.skipped, self.args
        variants = [variant and replace(variant) for variant in self.variants]
        try:
            with measuring_nothing(self.metric):
                yield
        finally:
            self.largest_std, self.skipped, self.args = largest_std, skipped, args
            self.variants = variants

    def _local_examples(self, prompts, completions, completion_ids) -> list[dict[str, Any]]:
        """This process's training examples. Also moves the target to the process's device."""
        state = PartialState()
        with failing_together(state):
            examples = self.examples_to_measure(prompts, completions, completion_ids)
            self.place_target(state.device)
        return examples

    def examples_to_measure(
        self, prompts: list[str | Messages], completions: list[str | Messages], completion_ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        """The examples of [`~trl_dpg.fine_tuning.TargetFineTuning.target_examples`]. A subclass may add fields to them."""
        return self.target_examples(prompts, completions, completion_ids)

    def _gathered(self, local: list[dict[str, Any]], prompts: list[Any]) -> tuple[list[dict[str, Any]], slice]:
        """The examples of all processes, and the slice of this process's. The order does not depend on the number of processes."""
        counts = gather_object([len(local)])
        examples = gather_object(local)
        size = self.num_datasets
        if size > 1:
            prompts = gather_object(prompts)
            groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
            if any(group != group[:1] * size for group in groups):
                raise ValueError(
                    f"A batch of {len(prompts)} completions cannot be split by rollout index. `num_generations` of `{self.__name__}` "
                    f"is {size}, but the batch does not hold {size} completions of each prompt. Give the reward the trainer's own "
                    "`num_generations`, and leave out `num_generations_eval` or set it to the same."
                )
        first = sum(counts[: PartialState().process_index])
        return examples, slice(first, first + len(local))

    def _counts(self, examples: list[dict[str, Any]]) -> dict[str, int]:
        return {
            "empty": len(examples) - len(indices_to_train_on(examples, self.args.max_length)),
            "truncated": sum(not example["ended"] for example in examples),
            "cut": sum(len(example["input_ids"]) > self.args.max_length for example in examples),
        }

    def _warn_of_texts(self, examples: list[dict[str, Any]]) -> None:
        counts = self._counts(examples)
        if counts["truncated"] == len(examples) and len({example["length"] for example in examples}) > 1:
            warnings.warn(
                "Completions have different lengths, but none ends in one of `eos_token_ids` "
                f"({self.eos_token_ids}). So the target does not learn to end a text. Pass the generator's end-of-sequence tokens as "
                f"`eos_token_ids` of `{type(self).__name__}`.",
                stacklevel=3,
            )
        if 2 * counts["cut"] > len(examples):
            warnings.warn(
                f"Most texts have more than {self.args.max_length} of the target's tokens (`max_length`, `target_max_length` in the "
                "trainer). Later tokens are cut off and earn nothing. Raise this limit, above all if `formatting_func` adds the "
                "prompt.",
                stacklevel=3,
            )

    def _values(self, examples: list[dict[str, Any]], trainer_state: TrainerState | None) -> tuple[Tensor, dict]:
        """Results of `measure` in this step, averaged over the variants of the recipe."""
        step = 0 if trainer_state is None else trainer_state.global_step
        trained = indices_to_train_on(examples, self.args.max_length)
        datasets = [[i for i in trained if i % self.num_datasets == j] for j in range(self.num_datasets)]
        self._real = [[] if self.replay is None else self.replay.beside(len(d), step) for d in datasets]
        values, found = [], []
        for variant in self.variants:
            with self.in_place(variant):
                args = replace(self.args, seed=(self.args.seed + step) % 2**64)
                of_variant, figures = self.measure(examples, datasets, args, PartialState())
            values.append(of_variant)
            found.append(figures)
        self.skipped = False
        for variant, figures in zip(self.variants, found, strict=True):
            with self.in_place(variant):
                self._keep_what_was_measured(figures)
        figures = mean_over_variants(found)
        if self.replay is not None:
            figures["replayed"] = sum(map(len, self._real))
        return torch.stack(values).mean(dim=0), figures

    def _skip_or_raise(self, error: FloatingPointError, trainer_state: TrainerState | None) -> None:
        step = "" if trainer_state is None else f" of step {trainer_state.global_step}"
        if self.nonfinite == "raise":
            raise FloatingPointError(
                f"The target's run on the generation batch{step}: {error} To go on without such a batch, set "
                "`nonfinite='skip'`."
            ) from error
        logger.warning("The generation batch%s is skipped: %s", step, error)
        self.skipped = True

    def _keep_what_was_measured(self, figures: dict[str, float]) -> None:
        if self.args.adam_epsilon_root == "auto":
            self.args = replace(self.args, adam_epsilon_root=figures["adam_epsilon_root"])
        if "micro_batch_size" in figures:  # smaller now if memory ran out
            self.args = replace(self.args, micro_batch_size=int(figures["micro_batch_size"]))

    def _standardized(self, values: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Rewards with mean 0 and standard deviation 1 (less if that of the values is below the floor), and figures to log."""
        finite = values[values.isfinite()]
        mean, std = finite.mean(), finite.std(correction=0).item()
        if finite.max() - finite.min() <= ROUNDING * finite.abs().max():
            std = 0.0
            warnings.warn(
                "All completions of this generation batch have the same value, so its rewards are zero and the generator "
                "learns nothing from it. Are all completions the same? Raise `temperature` or lower `learning_rate`.",
                stacklevel=3,
            )
        self.largest_std = max(self.largest_std, std)
        scale = max(std, STD_FLOOR * self.largest_std)
        rewards = (values - mean) / scale if std > 0 else torch.zeros_like(values)
        return rewards, {
            "mean": mean.item(),
            "std": std,
            "min": finite.min().item(),
            "max": finite.max().item(),
            "nonfinite": len(values) - len(finite),
        }

    def run_each(
        self,
        run: Callable[..., Output],
        examples: list[dict[str, Any]],
        datasets: list[list[int]],
        args: TargetTrainingArguments,
        processes: PartialState,
    ) -> dict[int, Output]:
        """
        Returns the outputs of `run` on the datasets that are not empty, by number. `"auto"` is measured on the first dataset.

        Real examples, if there are any, stand after the examples of the dataset.
        """
        outputs = {}
        for number, dataset in enumerate(datasets):
            if dataset:
                data = [examples[i] for i in dataset] + self._real[number]
                output = run(self.target_model, data, self.metric, args, accelerator=processes)
                args = replace(
                    args, adam_epsilon_root=output.adam_epsilon_root, micro_batch_size=output.micro_batch_size
                )
                outputs[number] = output
        return outputs

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            f"{self.__name__}_largest_std": self.largest_std,
            "micro_batch_size": self.args.micro_batch_size,
            "skipped": self.skipped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.largest_std = state.get(f"{self.__name__}_largest_std", 0.0)  # that of another reward has other units
        self.skipped = state.get("skipped", False)


def mean_figures(outputs: Iterable[TrainingOutput]) -> dict[str, float]:
    """Figures to log for several runs: means over the runs."""
    outputs = list(outputs)
    size = outputs[-1].micro_batch_size  # the smallest, since each run passes its size on to the next
    return {
        "metric_before": outputs[0].metric_before,
        "metric_after": fmean(out.metric_after for out in outputs),
        "metric_gain": fmean(out.metric_after - out.metric_before for out in outputs),
        "adam_epsilon_root": outputs[0].adam_epsilon_root,
        "target_loss": fmean(fmean(out.losses) for out in outputs),
        **({} if size is None else {"micro_batch_size": size}),
        **{name: fmean(out.readouts[name] for out in outputs) for name in outputs[0].readouts},
    }


def mean_over_variants(found: list[dict[str, float]]) -> dict[str, float]:
    """Figures to log for several variants: means of the figures that all of them have, and the figures of each."""
    if len(found) == 1:
        return found[0]
    names = [name for name in found[0] if all(name in figures for figures in found)]
    means = {name: fmean(figures[name] for figures in found) for name in names}
    return means | {f"variant_{i}/{name}": value for i, of in enumerate(found) for name, value in of.items()}
