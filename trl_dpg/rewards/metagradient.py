"""The metagradient of each completion as a TRL reward."""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from ..data import Messages, indices_to_train_on, to_target_example
from ..metagradients import TargetTrainingArguments, compute_metagradients
from ..metagradients.api import Metric
from ..metagradients.model import check_model, trainable_parameters, vocab_size
from ..metagradients.parallel import failing_together
from ..target import load_target_model, load_target_tokenizer


STD_FLOOR = 0.05  # of the largest standard deviation so far


class MetagradientReward:
    r"""
    Reward of a completion: how much training the target on it improves the metric.

    Fine-tunes the target, from its original weights, on the completions of the whole generation batch, over all
    processes, and returns each completion's metagradient (see [`~trl_dpg.metagradients.compute_metagradients`]),
    standardized over the batch to mean 0 and standard deviation 1: raw ones, of the order of 1e-9 to 1e-4, would drown in
    the 1e-4 that TRL adds to a standard deviation. Where the deviation falls below 5 % of the largest so far, as it does
    once the goal is reached, it is no longer divided out: what is left is noise, and a generator that is driven by noise
    at full strength unlearns. Scaling is the same for every prompt, so groups stay comparable. With
    `scale_rewards="none"` in [`~trl.GRPOConfig`] all of this holds for the advantages too. The raw values go into the
    logs and, as column `metagradient_raw`, into the completions table.

    Rules for what cannot be scored:

    - An empty completion is not trained on and has a raw metagradient of exactly 0, which is its effect. A batch of
      nothing else is an error.
    - A truncated completion is trained on like any other, but without EOS. What is longer than `args.max_length` in the
      target's tokens is cut there.
    - A completion whose own metagradient is not finite gets `None`, which TRL leaves out of the baseline and gives no
      advantage. A loss, gradient or metric that is not finite is an error.

    Each is counted in the logs. An error on one process ends the run on all of them.

    Args:
        target_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to fine-tune, or its id or directory (loaded in float32). Its weights are the same after every call.
        metric (`Callable`):
            Differentiable metric of the fine-tuned target, higher is better. See [`~trl_dpg.metrics`].
        args ([`~trl_dpg.metagradients.TargetTrainingArguments`], *optional*):
            Recipe of the fine-tuning run. By default `adam_epsilon_root` is `"auto"`, which is measured in the first
            call and then kept. The shuffle's seed is `seed` plus the trainer's global step.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. Loaded from the target's name if `None`.
        formatting_func (`Callable`, *optional*):
            Maps `{"prompt": ..., "completion": ...}` to the text that the target is trained on, as in
            [`~trl.SFTTrainer`]. By default it is the completion's text alone.
        eos_token_ids (`list[int]`, *optional*):
            The *generator's* tokens that end a completion. Defaults to the EOS token of `processing_class`.

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

    __name__ = "metagradient"  # what TRL logs it as

    def __init__(
        self,
        target_model: str | PreTrainedModel | PeftModel,
        metric: Metric,
        args: TargetTrainingArguments | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        eos_token_ids: list[int] | None = None,
    ):
        check_metric(metric)
        self.target_model = load_target_model(target_model)
        self.metric = metric
        self.args = args or TargetTrainingArguments(adam_epsilon_root="auto")
        self.processing_class = processing_class or load_target_tokenizer(self.target_model.config._name_or_path)
        self.formatting_func = formatting_func
        self.largest_std = 0.0
        self.eos_token_ids = eos_token_ids or [self.processing_class.eos_token_id]

        # What cannot be trained or measured is refused here rather than after the first generation.
        trainable_parameters(self.target_model)
        check_model(self.target_model)
        if hasattr(metric, "setup"):
            metric.setup(self.target_model)
        rows = vocab_size(self.target_model)
        if len(self.processing_class) > rows:
            raise ValueError(
                f"`processing_class` has {len(self.processing_class)} tokens, but the target model only {rows} rows in its "
                "input embedding: they do not belong together. Pass the target's own tokenizer "
                "(`target_processing_class` in the trainer)."
            )

    def target_examples(
        self, prompts: list[str | Messages], completions: list[str | Messages], completion_ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        """Training examples of these completions: `input_ids`, and whether it `ended` and its `length` when generated."""
        examples = []
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            ended = len(ids) > 0 and ids[-1] in self.eos_token_ids
            example = to_target_example(prompt, completion, ended, self.processing_class, self.formatting_func)
            examples.append({**example, "ended": ended, "length": len(ids)})
        return examples

    def state(self) -> dict[str, Any]:
        """What was measured so far, for a checkpoint."""
        state = {"adam_epsilon_root": self.args.adam_epsilon_root, "largest_std": self.largest_std}
        if hasattr(self.metric, "state"):
            state["metric"] = self.metric.state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what [`~MetagradientReward.state`] gave, where this run measures it too."""
        self.largest_std = state["largest_std"]
        if self.args.adam_epsilon_root == "auto":
            self.args = replace(self.args, adam_epsilon_root=state["adam_epsilon_root"])
        if hasattr(self.metric, "load_state"):
            self.metric.load_state(state["metric"])

    def place_target(self, device: torch.device) -> None:
        """Moves the target to a device, unless it is there: a quantized one cannot be moved."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if next(self.target_model.parameters()).device != device:
            self.target_model.to(device)  # type: ignore[arg-type]

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
            `list[float | None]`: One standardized metagradient per completion.
        """
        start_time = time.perf_counter()
        state = PartialState()
        with failing_together(state):
            local = self.target_examples(prompts, completions, completion_ids)
            self.place_target(state.device)
        # Rank r holds the r-th slice of the batch, so this order does not depend on the number of processes.
        counts = gather_object([len(local)])
        examples = gather_object(local)

        trained = indices_to_train_on(examples)
        if not any(example["ended"] for example in examples) and len({example["length"] for example in examples}) > 1:
            warnings.warn(
                "Completions of different lengths, but none ends in one of `eos_token_ids` "
                f"({self.eos_token_ids}), so the target is taught no end. Pass the generator's end-of-sequence tokens as "
                "`eos_token_ids` of `MetagradientReward`.",
                stacklevel=2,
            )
        args = self.args
        if trainer_state is not None:
            args = replace(args, seed=args.seed + trainer_state.global_step)
        out = compute_metagradients(
            self.target_model, [examples[i] for i in trained], self.metric, args, accelerator=state
        )
        if args.adam_epsilon_root == "auto":
            self.args = replace(self.args, adam_epsilon_root=out.adam_epsilon_root)

        raw = torch.zeros(len(examples), dtype=torch.float64)
        raw[trained] = out.metagradients.double()
        finite = raw.isfinite()
        if not finite.any():
            raise FloatingPointError(
                "No metagradient of this generation batch is finite. Lower `target_learning_rate` or raise "
                "`target_adam_epsilon_root`."
            )
        mean, std = raw[finite].mean(), raw[finite].std(correction=0)
        self.largest_std = max(self.largest_std, std.item())
        if std == 0:
            warnings.warn(
                "All metagradients of this generation batch are equal, so its rewards are zero and the generator learns "
                "nothing from it. Are all completions the same? Raise `temperature` or lower `learning_rate`.",
                stacklevel=2,
            )
        scale = max(std.item(), STD_FLOOR * self.largest_std)
        rewards = (raw - mean) / scale if std > 0 else torch.zeros_like(raw)

        curvature: dict[str, float] = {}
        if out.curvature_errors:
            curvature = {"curvature_error": max(out.curvature_errors), "exact_fallbacks": out.num_exact_fallbacks}

        first = sum(counts[: state.process_index])
        mine = slice(first, first + len(local))
        if log_extra is not None:
            log_extra("metagradient_raw", raw[mine].tolist())
        if log_metric is not None:  # the same value on every process, as TRL averages over them
            for name, value in {
                "mean": mean.item(),
                "std": std.item(),
                "min": raw[finite].min().item(),
                "max": raw[finite].max().item(),
                "nonfinite": (~finite).sum().item(),
                "empty": len(examples) - len(trained),
                "truncated": sum(not example["ended"] for example in examples),
                "cut": sum(len(example["input_ids"]) > args.max_length for example in examples),
                "metric_before": out.metric_before,
                "metric_after": out.metric_after,
                "metric_gain": out.metric_after - out.metric_before,
                "adam_epsilon_root": out.adam_epsilon_root,
                **curvature,
                "target_loss": sum(out.losses) / len(out.losses),
                "seconds": time.perf_counter() - start_time,
                **out.readouts,
            }.items():
                log_metric(f"metagradient/{name}", value)
        return [reward if ok else None for reward, ok in zip(rewards[mine].tolist(), finite[mine], strict=True)]


def check_metric(metric: Any) -> None:
    """Refuses what is no metric, before anything is loaded."""
    if not callable(metric) or isinstance(metric, type):
        raise ValueError(
            f"`metric` must be a function of the fine-tuned target that returns a scalar tensor, got {metric!r}. Pass a "
            "function, or an instance of one of the classes in `trl_dpg.metrics`."
        )
