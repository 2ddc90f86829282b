"""The metagradient of each completion as a TRL reward."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from ..credit import TokenAdvantages, WordCredit, aligned_candidates, token_advantages, word_credits, written_by
from ..data import Messages
from ..metagradients import TargetTrainingArguments, TrainingOutput, compute_metagradients, train_and_measure
from ..sft_rows import Row
from .base import STD_FLOOR, TargetReward, mean_figures


logger = logging.getLogger(__name__)

# Two optimizers count as different if the gains of their runs differ by more than this share of the larger gain.
OTHER_OPTIMIZER = 0.9


class MetagradientReward(TargetReward):
    r"""
    Reward of a completion: how much training the target on it improves the metric.

    Fine-tunes the target, from its original weights, on the completions of the whole generation batch, over all
    processes. Each completion gets its metagradient (see [`~trl_dpg.metagradients.compute_metagradients`]), standardized over the
    batch to mean 0 and standard deviation 1. Raw metagradients are of the order of 1e-9 to 1e-4. They would be lost beside the 1e-4
    that TRL adds to a standard deviation. The divisor is at least 5 % of the largest deviation so far. Once the goal is reached,
    the deviation falls below that, and metagradients are mostly noise. At full strength, this noise would make the generator unlearn.
    All prompts have the same scale, so groups stay comparable. With `scale_rewards="none"` in [`~trl.GRPOConfig`], all of this holds
    for the advantages too. Raw values go into the logs, and as column `metagradient_raw` into the completions table.

    Some completions need rules of their own:

    - An empty completion is not trained on, so its raw metagradient is exactly 0. The same holds for a completion without any
      token that has a loss, for example if the prompt fills `args.max_length`. A batch of such completions alone is an error.
    - A truncated completion is trained on like any other, but without EOS. Tokens of the target beyond `args.max_length` are cut off.
    - A completion whose own metagradient is not finite gets `None`. TRL leaves it out of the baseline and gives it no advantage. A
      loss, gradient or metric that is not finite is an error.

    The logs count all of these. An error on one process ends the run on all of them.

    Args:
        target_model, metric, args, processing_class, formatting_func, eos_token_ids:
            As in [`~trl_dpg.fine_tuning.TargetFineTuning`]: the model to fine-tune, its metric, its recipe, its tokenizer, the text to
            train on, and the *generator's* tokens that end a completion. The shuffle's seed is `args.seed` plus the trainer's global
            step.
        cross_group_batching (`bool`, *optional*, defaults to `True`):
            Whether all completions of a prompt are in one dataset. If `False`, the generation batch is split by rollout
            index into `num_generations` datasets of one completion per prompt. The target is fine-tuned on each of them, from its
            original weights. Rewards are still standardized over the whole batch. Logged figures are means over the runs.
        num_generations (`int`, *optional*):
            The trainer's number of completions per prompt, which `cross_group_batching=False` needs.
        nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do if a loss, gradient or metric of the run is not finite. `"raise"` raises a [`FloatingPointError`]. `"skip"` skips
            the batch: all its rewards are 0.
        completion_only_loss (`bool`), assistant_only_loss (`bool`) (*optional*):
            Which tokens have a loss, as in [`~trl_dpg.fine_tuning.TargetFineTuning`].
        replay_dataset (`Dataset`), replay_ratio (`float`), variants (`list[dict]`) (*optional*):
            Real examples to add to completions, and variants of the recipe, as in [`~trl_dpg.fine_tuning.TargetFineTuning`]. Real
            examples get no reward. Metagradients are averaged over the variants.

    Example:

    ```python
    from transformers import AutoTokenizer
    from trl import GRPOTrainer
    from trl_dpg import MetagradientReward
    from trl_dpg.metrics import LMHeadNorm

    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    reward = MetagradientReward("openai-community/gpt2", LMHeadNorm(), eos_token_ids=[tokenizer.eos_token_id])
    trainer = GRPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=reward, train_dataset=dataset)
    ```
    """

    __name__ = "metagradient"

    def __init__(
        self,
        target_model: str | PreTrainedModel | PeftModel,
        metric: Callable[[Any], Tensor],
        args: TargetTrainingArguments | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[Row], str | Row] | None = None,
        eos_token_ids: list[int] | None = None,
        cross_group_batching: bool = True,
        num_generations: int | None = None,
        nonfinite: str = "raise",
        completion_only_loss: bool | None = None,
        assistant_only_loss: bool = False,
        replay_dataset: Dataset | list[dict[str, Any]] | None = None,
        replay_ratio: float = 0.0,
        variants: list[dict[str, Any]] | None = None,
    ):
        if not cross_group_batching and num_generations is None:
            raise ValueError(
                "`cross_group_batching=False` needs `num_generations`, the trainer's number of completions per prompt."
            )
        target = target_model, metric, args, processing_class, formatting_func, eos_token_ids
        super().__init__(
            *target,
            num_datasets=1 if cross_group_batching else num_generations,  # type: ignore[arg-type]
            nonfinite=nonfinite,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
            replay_dataset=replay_dataset,
            replay_ratio=replay_ratio,
            variants=variants,
        )
        self.tape = "device"  # place of the last run's tape
        self.largest_unit = 0.0
        # The trainer sets this if it gives every token its own credit. TRL itself takes one number per completion from a reward.
        self.credit_of_tokens = False
        # Candidates at each token of this process's completions, shape `(tokens, k)`
        self.candidate_ids: list[Tensor] | None = None
        # Examples, tokens' metagradients and candidates' metagradients of the last generation batch, over all processes
        self._examples: list[dict[str, Any]] = []
        self._tokens: list[Tensor] = []
        self._candidates: list[Tensor] | None = None

    def state(self) -> dict[str, Any]:
        return {**super().state(), "largest_unit": self.largest_unit}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.largest_unit = state.get("largest_unit", 0.0)

    def examples_to_measure(
        self, prompts: list[str | Messages], completions: list[str | Messages], completion_ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        examples = super().examples_to_measure(prompts, completions, completion_ids)
        if not self.credit_of_tokens:
            return examples
        for i, example in enumerate(examples):
            example["written_by"] = []
            if example["input_ids"]:
                example["written_by"] = written_by(example, self.generator_processing_class, self.processing_class)  # type: ignore[arg-type]
            if self.candidate_ids is not None:
                end = example.get("closing", self.processing_class.eos_token_id)
                example["candidates"] = aligned_candidates(self.candidate_ids[i], example, self.eos_token_ids, end)
        return examples

    def token_advantages(self, discount: float) -> TokenAdvantages | None:
        """
        Computes advantages of all tokens of the last generation batch, over all processes. Returns `None` if the batch was skipped.

        [`~MetagradientReward.__call__`] standardizes the values of completions. This method standardizes those of tokens, with the
        same floor.
        """
        if self.skipped:
            return None
        finite = [bool(tokens.isfinite().all()) for tokens in self._tokens]
        for i, values in enumerate(self._candidates or []):
            finite[i] &= bool(values.isfinite().all())
        candidates = None
        if self._candidates is not None:
            candidates = [
                values.masked_fill(example["candidates"] < 0, torch.nan)
                for values, example in zip(self._candidates, self._examples, strict=True)
            ]
        result = token_advantages(
            self._tokens,
            [example["written_by"] for example in self._examples],
            [example["generated"] if ok else [] for example, ok in zip(self._examples, finite, strict=True)],
            discount,
            STD_FLOOR * self.largest_unit,
            candidates,
        )
        self.largest_unit = max(self.largest_unit, result.unit)
        return result

    def credit_by_word(self, index: int) -> list[WordCredit]:
        """
        Credit of each token of a completion in the last generation batch, as raw metagradients.

        Args:
            index (`int`):
                Index of the completion among those of all processes.

        Returns:
            `list[WordCredit]`: One for each of the generator's tokens. Empty if there is no credit of tokens.
        """
        if not self.credit_of_tokens or self.skipped or index >= len(self._examples):
            return []
        example = self._examples[index]
        candidates = None if self._candidates is None else self._candidates[index]
        return word_credits(self.generator_processing_class, example, self._tokens[index], candidates)  # type: ignore[arg-type]

    def _values(self, examples: list[dict[str, Any]], trainer_state: TrainerState | None) -> tuple[Tensor, dict]:
        self._examples = examples
        self._tokens = [torch.zeros(len(example["input_ids"])) for example in examples]
        self._candidates = None
        if self.candidate_ids is not None:
            self._candidates = [torch.zeros(example["candidates"].shape) for example in examples]
        self._at_start = trainer_state is not None and trainer_state.global_step == 0
        return super()._values(examples, trainer_state)

    def measure(self, examples, datasets, args, processes) -> tuple[Tensor, dict[str, float]]:
        outs = self.run_each(compute_metagradients, examples, datasets, args, processes)
        self._say_where_the_tape_lies(outs.values(), args, processes)
        raw = torch.zeros(len(examples), dtype=torch.float64)
        share = 1 / len(self.variants)
        for number, out in outs.items():  # real examples come after those of the dataset, and get no reward
            raw[datasets[number]] = out.metagradients[: len(datasets[number])].double()
            for row, i in enumerate(datasets[number]):
                self._tokens[i] += share * out.token_metagradients[row]
                if self._candidates is not None and out.candidate_metagradients is not None:
                    self._candidates[i] += share * out.candidate_metagradients[row]
        if not raw.isfinite().any():
            raise FloatingPointError(
                "No metagradient of this generation batch is finite. Lower `target_learning_rate` or raise "
                "`target_adam_epsilon_root`."
            )
        figures = mean_figures(outs.values())
        if self._at_start and args.optim == "adamw":
            number, out = next(iter(outs.items()))
            data = [examples[i] for i in datasets[number]] + self._real[number]
            without = replace(args, adam_epsilon_root=0.0, micro_batch_size=out.micro_batch_size)
            try:
                ordinary = train_and_measure(self.target_model, data, self.metric, without, accelerator=processes)
                if processes.is_main_process:
                    warn_of_another_optimizer(out, ordinary)
            except FloatingPointError as error:  # only the warning needs this run
                logger.warning("Without `target_adam_epsilon_root`, as in ordinary fine-tuning: %s", error)
        errors = [error for out in outs.values() for error in out.curvature_errors]
        if errors:
            figures["curvature_error"] = max(errors)
            figures["exact_fallbacks"] = sum(out.num_exact_fallbacks for out in outs.values())
        return raw, figures

    def _say_where_the_tape_lies(self, outs, args: TargetTrainingArguments, processes: PartialState) -> None:
        for out in outs:
            if out.plan is not None and out.plan.tape != self.tape:
                self.tape = out.plan.tape
                if args.tape == "auto" and processes.is_main_process:
                    logger.warning("The target's tape lies on %s from here on: %s.", self.tape, out.plan)


def warn_of_another_optimizer(out: TrainingOutput, ordinary: TrainingOutput) -> None:
    """Warns if AdamW with the `adam_epsilon_root` of training does not do to the metric what ordinary AdamW does."""
    gain, ordinary_gain = (run.metric_after - run.metric_before for run in (out, ordinary))
    if abs(gain - ordinary_gain) > OTHER_OPTIMIZER * max(abs(gain), abs(ordinary_gain)):
        logger.warning(
            "On the first generation batch, the metric changes by %.2g with `target_adam_epsilon_root` %.2g, but by %.2g without, as in "
            "validation and in ordinary fine-tuning. So the reward is about another optimizer. Try a %s `target_adam_epsilon_root`.",
            gain,
            out.adam_epsilon_root,
            ordinary_gain,
            "smaller" if abs(gain) < abs(ordinary_gain) else "different",
        )
