"""The target's fine-tuning run, and what rewards that come from it have in common."""

import inspect
import logging
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
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState

from ..data import (
    Messages,
    completion_parts,
    generated_parts,
    indices_to_train_on,
    to_target_examples,
    without_environment,
)
from ..metagradients import TargetTrainingArguments, TrainingOutput
from ..metagradients.metric import Metric, as_metric
from ..metagradients.runtime.model import check_model, trainable_parameters, vocab_size
from ..metagradients.runtime.processes import failing_together
from ..target import load_target_model, load_target_tokenizer


logger = logging.getLogger(__name__)

STD_FLOOR = 0.05  # of the largest standard deviation so far
ROUNDING = 1e-6  # of the largest value: by which values of equal completions may differ, in different rows of a batch

Output = TypeVar("Output", bound=TrainingOutput)


class TargetTraining:
    r"""
    What completions are written for: a target, the recipe of its fine-tuning run, and the metric of the result.

    The trainer's validation needs it whatever the reward is. Rewards that fine-tune the target are subclasses.

    Args:
        target_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to fine-tune, or its id or directory (loaded in float32).
        metric (`Callable`):
            Differentiable metric of the fine-tuned target, higher is better. See [`~trl_dpg.metrics`].
        args ([`~trl_dpg.metagradients.TargetTrainingArguments`], *optional*):
            Recipe of the fine-tuning run. `adam_epsilon_root="auto"`, the default, is measured once and then kept.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. Loaded from the target's name if `None`.
        formatting_func (`Callable`, *optional*):
            Maps `{"prompt": ..., "completion": ...}` to the text that the target is trained on, as in
            [`~trl.SFTTrainer`]. By default it is the completion's text alone.
        eos_token_ids (`list[int]`, *optional*):
            The *generator's* tokens that end a completion. Defaults to the EOS token of `processing_class`.
    """

    def __init__(
        self,
        target_model: str | PreTrainedModel | PeftModel,
        metric: Callable[[Any], Tensor],
        args: TargetTrainingArguments | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        eos_token_ids: list[int] | None = None,
    ):
        check_metric(metric)
        self.skipped = False  # only a reward that comes from the target's run skips a batch
        self.target_model = load_target_model(target_model)
        self.metric = as_metric(metric)
        self.args = args or TargetTrainingArguments()
        self.processing_class = processing_class or load_target_tokenizer(self.target_model.config._name_or_path)
        self.formatting_func = formatting_func
        self.eos_token_ids = eos_token_ids or [self.processing_class.eos_token_id]
        # Set by the trainer for each batch: for each token of these completions, 1 if the generator wrote it and 0 if a tool did
        self.tool_masks: list[list[int]] | None = None
        self.generator_processing_class: PreTrainedTokenizerBase | None = None

        # What cannot be trained or measured is refused here rather than after the first generation.
        trainable_parameters(self.target_model)
        check_model(self.target_model)
        self.metric.setup(self.target_model)
        # Tokens for which the model has no row are refused where one occurs: a tokenizer may know some that no text has.
        rows, eos = vocab_size(self.target_model), self.processing_class.eos_token_id
        if eos is not None and eos >= rows:
            raise ValueError(
                f"`processing_class` has {len(self.processing_class)} tokens, but the target model only {rows} rows in its "
                f"input embedding, and none for EOS ({eos}): they do not belong together. Pass the target's own tokenizer "
                "(`target_processing_class` in the trainer)."
            )

    def target_examples(
        self, prompts: list[str | Messages], completions: list[str | Messages], completion_ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        """
        Training examples of these completions.

        Returns:
            `list[dict]`: `text` and `input_ids`; the `parts` of the text that the generator wrote; whether the completion
                `ended`; which of its tokens were `generated`, and how many (`length`).
        """
        masks = self.tool_masks or [[1] * len(ids) for ids in completion_ids]
        parts = [completion_parts(completion) for completion in completions]
        if self.tool_masks is not None and self.generator_processing_class is not None:
            each = zip(completions, completion_ids, masks, strict=True)
            parts = [generated_parts(*one, self.generator_processing_class) for one in each]
            completions = [
                completion if completion_parts(completion) == own else without_environment(completion, own)
                for completion, own in zip(completions, parts, strict=True)
            ]
        ended = [len(ids) > 0 and ids[-1] in self.eos_token_ids for ids in completion_ids]
        examples = to_target_examples(prompts, completions, ended, self.processing_class, self.formatting_func)
        return [
            {**example, "parts": own, "ended": end, "generated": mask, "length": sum(mask)}
            for example, own, end, mask in zip(examples, parts, ended, masks, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """What was measured so far, for a checkpoint."""
        return {"adam_epsilon_root": self.args.adam_epsilon_root, "metric": self.metric.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what [`~TargetTraining.state`] gave, where this run measures it too."""
        if self.args.adam_epsilon_root == "auto":
            self.args = replace(self.args, adam_epsilon_root=state["adam_epsilon_root"])
        self.metric.load_state(state["metric"])

    def place_target(self, device: torch.device) -> None:
        """Moves the target to a device, unless it is there: a quantized one cannot be moved."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if next(self.target_model.parameters()).device != device:
            self.target_model.to(device)  # type: ignore[arg-type]


class TargetReward(TargetTraining, ABC):
    """
    Base of the rewards that fine-tune the target on the generation batch, as one dataset or split by rollout index.

    Subclasses say in `measure` what the value of each example is. Here examples are gathered over all processes, and
    values are standardized and logged.

    Args:
        num_datasets (`int`, *optional*, defaults to `1`):
            Datasets that a generation batch is split into: row i belongs to dataset `i % num_datasets`.
        nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do where a loss, gradient or metric of the target's run is not finite: `"raise"` a
            [`FloatingPointError`], or `"skip"` the batch: all rewards are 0, and `skipped` is `True` until the next one.
        **kwargs:
            Arguments of [`TargetTraining`].
    """

    __name__: str  # what TRL logs it as

    def __init__(self, *args, num_datasets: int = 1, nonfinite: str = "raise", **kwargs):
        super().__init__(*args, **kwargs)
        self.num_datasets = num_datasets
        self.nonfinite = nonfinite
        self.largest_std = 0.0

    def examples_to_measure(
        self, prompts: list[str | Messages], completions: list[str | Messages], completion_ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        """This process's training examples, with what `measure` wants to know of them."""
        return self.target_examples(prompts, completions, completion_ids)

    @abstractmethod
    def measure(
        self,
        examples: list[dict[str, Any]],
        datasets: list[list[int]],
        args: TargetTrainingArguments,
        processes: PartialState,
    ) -> tuple[Tensor, dict[str, float]]:
        """
        Values of the examples, and what to log.

        Args:
            examples (`list[dict]`): Examples of the whole generation batch.
            datasets (`list[list[int]]`): Indices of the examples in each dataset, without those that cannot be trained on.
            args ([`~trl_dpg.metagradients.TargetTrainingArguments`]): Recipe of this step.
            processes ([`~accelerate.PartialState`]): Processes that share the work; each makes this call.

        Returns:
            `tuple[Tensor, dict[str, float]]`: Values in float64, one per example, and figures.
        """

    def run_each(
        self,
        run: Callable[..., Output],
        examples: list[dict[str, Any]],
        datasets: list[list[int]],
        args: TargetTrainingArguments,
        processes: PartialState,
    ) -> dict[int, Output]:
        """Outputs of `run` on the datasets that are not empty, by number. `"auto"` is measured on the first."""
        outputs = {}
        for number, dataset in enumerate(datasets):
            if dataset:
                data = [examples[i] for i in dataset]
                outputs[number] = run(self.target_model, data, self.metric, args, accelerator=processes)
                args = replace(
                    args,
                    adam_epsilon_root=outputs[number].adam_epsilon_root,
                    micro_batch_size=outputs[number].micro_batch_size,
                )
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
        self.largest_std = state.get(f"{self.__name__}_largest_std", 0.0)  # another reward's is in other units
        self.skipped = state.get("skipped", False)
        sizes = [size for size in (self.args.micro_batch_size, state.get("micro_batch_size")) if size is not None]
        if sizes:  # where memory ran out, smaller than asked for
            self.args = replace(self.args, micro_batch_size=min(sizes))

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
        Rewards of this process's completions; called by TRL on every process.

        Args:
            prompts (`list[str]` or `list[list[dict]]`): Prompts, one per completion.
            completions (`list[str]` or `list[list[dict]]`): What the generator wrote.
            completion_ids (`list[list[int]]`): The same in the generator's tokens.
            trainer_state ([`~transformers.TrainerState`], *optional*): Its global step varies the shuffle.
            log_extra (`Callable`, *optional*): TRL's hook for columns of the completions table.
            log_metric (`Callable`, *optional*): TRL's hook for scalars.

        Returns:
            `list[float | None]`: One standardized value per completion.
        """
        trainer = _evaluating_trainer(log_metric)
        if trainer is None:
            return self._rewards(prompts, completions, completion_ids, trainer_state, log_extra, log_metric)
        largest_std, skipped, args = self.largest_std, self.skipped, self.args
        try:
            with measuring_nothing(self.metric):
                return self._rewards(prompts, completions, completion_ids, trainer_state, log_extra, log_metric)
        finally:
            self.largest_std, self.skipped, self.args = largest_std, skipped, args

    def _check_groups(self, prompts: list[str | Messages]) -> None:
        """Refuses a batch whose rows are not `num_datasets` completions of one prompt, and then of the next."""
        size = self.num_datasets
        groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        if any(group != group[:1] * size for group in groups):
            raise ValueError(
                f"A batch of {len(prompts)} completions cannot be split by rollout index. `num_generations` of `{self.__name__}` is "
                f"{size}, but the batch does not hold {size} completions of each prompt. Give the reward the trainer's own "
                "`num_generations`, and leave out `num_generations_eval` or set it to the same."
            )

    def _rewards(
        self, prompts, completions, completion_ids, trainer_state, log_extra, log_metric
    ) -> list[float | None]:
        start_time = time.perf_counter()
        state = PartialState()
        with failing_together(state):
            local = self.examples_to_measure(prompts, completions, completion_ids)
            self.place_target(state.device)
        # Rank r holds the r-th slice of the batch, so this order does not depend on the number of processes.
        counts = gather_object([len(local)])
        examples = gather_object(local)
        if self.num_datasets > 1:
            self._check_groups(gather_object(prompts))
        trained = indices_to_train_on(examples)
        if not any(example["ended"] for example in examples) and len({example["length"] for example in examples}) > 1:
            warnings.warn(
                "Completions of different lengths, but none ends in one of `eos_token_ids` "
                f"({self.eos_token_ids}), so the target is taught no end. Pass the generator's end-of-sequence tokens as "
                f"`eos_token_ids` of `{type(self).__name__}`.",
                stacklevel=3,
            )
        args = self.args
        cut = sum(len(example["input_ids"]) > args.max_length for example in examples)
        if 2 * cut > len(examples):
            warnings.warn(
                f"Most texts have more than {args.max_length} of the target's tokens (`max_length`, `target_max_length` in the trainer), "
                "and what is behind them is cut off and earns nothing. Raise it, above all where `formatting_func` adds the prompt.",
                stacklevel=3,
            )
        if trainer_state is not None:
            args = replace(args, seed=(args.seed + trainer_state.global_step) % 2**64)
        datasets = [[i for i in trained if i % self.num_datasets == j] for j in range(self.num_datasets)]
        try:
            raw, figures = self.measure(examples, datasets, args, state)
        except FloatingPointError as error:  # on every process
            step = "" if trainer_state is None else f" of step {trainer_state.global_step}"
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    f"The target's run on the generation batch{step}: {error} To go on without such a batch, set "
                    "`nonfinite='skip'`."
                ) from error
            logger.warning("The generation batch%s is skipped: %s", step, error)
            self.skipped = True
            if log_extra is not None:  # else the table would show the last batch's
                log_extra(f"{self.__name__}_raw", [None] * len(local))
            if log_metric is not None:
                log_metric(f"{self.__name__}/skipped", 1.0)
            return [0.0] * len(local)
        self.skipped = False
        if self.args.adam_epsilon_root == "auto":
            self.args = replace(self.args, adam_epsilon_root=figures["adam_epsilon_root"])
        if "micro_batch_size" in figures:  # smaller now if memory ran out
            self.args = replace(self.args, micro_batch_size=int(figures["micro_batch_size"]))

        finite = raw.isfinite()
        mean, std = raw[finite].mean(), raw[finite].std(correction=0)
        if raw[finite].max() - raw[finite].min() <= ROUNDING * raw[finite].abs().max():
            std = torch.zeros_like(std)
            warnings.warn(
                "All completions of this generation batch have the same value, so its rewards are zero and the generator "
                "learns nothing from it. Are all completions the same? Raise `temperature` or lower `learning_rate`.",
                stacklevel=3,
            )
        self.largest_std = max(self.largest_std, std.item())
        scale = max(std.item(), STD_FLOOR * self.largest_std)
        rewards = (raw - mean) / scale if std > 0 else torch.zeros_like(raw)

        first = sum(counts[: state.process_index])
        mine = slice(first, first + len(local))
        if log_extra is not None:
            log_extra(f"{self.__name__}_raw", raw[mine].tolist())
        if log_metric is not None:  # the same value on every process, as TRL averages over them
            for name, value in {
                "mean": mean.item(),
                "std": std.item(),
                "min": raw[finite].min().item(),
                "max": raw[finite].max().item(),
                "nonfinite": (~finite).sum().item(),
                "empty": len(examples) - len(trained),
                "truncated": sum(not example["ended"] for example in examples),
                "cut": cut,
                **figures,
                **({"skipped": 0.0} if self.nonfinite == "skip" else {}),
                "seconds": time.perf_counter() - start_time,
            }.items():
                log_metric(f"{self.__name__}/{name}", value)
        return [reward if ok else None for reward, ok in zip(rewards[mine].tolist(), finite[mine], strict=True)]


@contextmanager
def measuring_nothing(metric: Metric) -> Iterator[None]:
    """Puts back what a metric measured in it, such as the `"auto"` scale of a pattern: only training batches count."""
    state = metric.state()
    try:
        yield
    finally:
        metric.load_state(state)


def _evaluating_trainer(log_metric: Any) -> Any:
    """
    The trainer that calls a reward in its evaluation, `None` in training.

    TRL does not tell a reward which it is. But the hook that it passes is a method of the trainer, whose model knows.
    """
    trainer = log_metric.__self__ if inspect.ismethod(log_metric) else None
    return trainer if isinstance(trainer, Trainer) and not trainer.model.training else None  # type: ignore[union-attr]


def check_metric(metric: Any) -> None:
    """Refuses what is no metric, before anything is loaded."""
    if not callable(metric) or isinstance(metric, type):
        raise ValueError(
            f"`metric` must be a function of the fine-tuned target that returns a scalar tensor, got {metric!r}. Pass a "
            "function, or an instance of one of the classes in `trl_dpg.metrics`."
        )


def mean_figures(outputs: Iterable[TrainingOutput]) -> dict[str, float]:
    """What is logged of several runs: means."""
    outputs = list(outputs)
    size = outputs[-1].micro_batch_size  # the smallest, as each run passes it on
    return {
        "metric_before": outputs[0].metric_before,
        "metric_after": fmean(out.metric_after for out in outputs),
        "metric_gain": fmean(out.metric_after - out.metric_before for out in outputs),
        "adam_epsilon_root": outputs[0].adam_epsilon_root,
        "target_loss": fmean(fmean(out.losses) for out in outputs),
        **({} if size is None else {"micro_batch_size": size}),
        **{name: fmean(out.readouts[name] for out in outputs) for name in outputs[0].readouts},
    }
