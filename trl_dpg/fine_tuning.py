"""The target and its fine-tuning on the generator's data, for rewards and for validation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import (
    Messages,
    completion_parts,
    completion_text,
    generated_parts,
    indices_to_train_on,
    repeated_places,
    target_row,
    to_target_examples,
    with_parts,
)
from .metagradients import TargetTrainingArguments
from .metagradients.metric import Metric, as_metric
from .metagradients.runtime.model import check_model, trainable_parameters, vocab_size
from .metagradients.runtime.sharding import reading
from .replay import Replay, check_replay
from .sft_rows import Row, check_loss, row_text
from .target import load_target_model, load_target_tokenizer
from .validation import validate
from .variants import Variant, make_variants, variant_recipes, with_measured, with_models


class TargetFineTuning:
    r"""
    A target, the recipe of its fine-tuning run on completions, and the metric of the result.

    Args:
        target_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to fine-tune, or its id or directory (loaded in float32). After every call, its original weights are restored.
        metric (`Callable`):
            Differentiable metric of the fine-tuned target, higher is better. See [`~trl_dpg.metrics`].
        args ([`~trl_dpg.metagradients.TargetTrainingArguments`], *optional*):
            Recipe of the fine-tuning run. `adam_epsilon_root="auto"`, the default, is measured once and then kept.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. Loaded from the target's name if `None`.
        formatting_func (`Callable`, *optional*):
            Maps `{"prompt": ..., "completion": ...}` to the text that the target is trained on, as in [`~trl.SFTTrainer`]. It may
            also return a dict with the same keys, whose values are texts, or lists of messages for the target's chat template. By
            default, the target is trained on the completion's text alone.
        eos_token_ids (`list[int]`, *optional*):
            The *generator's* tokens that end a completion. Defaults to the EOS token of `processing_class`.
        completion_only_loss (`bool`, *optional*):
            Whether the loss is on the completion alone, as in [`~trl.SFTConfig`]. `None` means yes if `formatting_func` returns a
            prompt and a completion.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether the loss is on the assistant's messages alone, as in [`~trl.SFTConfig`]. This needs messages, and a chat
            template that marks the assistant's parts with `{% generation %}`.
        replay_dataset (`Dataset` or `list[dict]`, *optional*):
            Real data to mix into every run. Rows have `text`, `messages`, or `prompt` and `completion`. Every fifth row, from the
            first on, is used in validation only.
        replay_ratio (`float`, *optional*, defaults to `0.0`):
            Share of real examples in every run. 0.5 means as many real examples as completions. Each step draws new ones, with the
            seed `args.seed` plus the global step.
        variants (`list[dict]`, *optional*):
            Variants of the recipe. A reward is the mean over the variants. Validation is done for each of them, and for the recipe
            itself. A dict holds changed fields of `args`, and maybe two other keys: `"model"`, another model with the same
            tokenizer, and `"head_seed"`, seed of a new random LM head. An empty dict is the recipe itself.
    """

    def __init__(
        self,
        target_model: str | PreTrainedModel | PeftModel,
        metric: Callable[[Any], Tensor],
        args: TargetTrainingArguments | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[Row], str | Row] | None = None,
        eos_token_ids: list[int] | None = None,
        completion_only_loss: bool | None = None,
        assistant_only_loss: bool = False,
        replay_dataset: Dataset | list[dict[str, Any]] | None = None,
        replay_ratio: float = 0.0,
        variants: list[dict[str, Any]] | None = None,
    ):
        metric = as_metric(metric)
        check_replay(replay_dataset, replay_ratio)
        self.args = args or TargetTrainingArguments()
        variant_recipes(self.args, variants)
        check_loss(formatting_func, completion_only_loss, assistant_only_loss, processing_class)
        self.skipped = False  # only rewards that fine-tune the target skip batches
        self.target_model = load_target_model(target_model)
        self.metric = metric
        self.processing_class = processing_class or load_target_tokenizer(self.target_model.config._name_or_path)
        self.formatting_func = formatting_func
        self.completion_only_loss, self.assistant_only_loss = completion_only_loss, assistant_only_loss
        self.eos_token_ids = eos_token_ids or [self.processing_class.eos_token_id]
        # The trainer sets these for each batch: for each token of its completions, 1 if the generator wrote it, 0 if a tool did
        self.tool_masks: list[list[int]] | None = None
        self.generator_processing_class: PreTrainedTokenizerBase | None = None

        # A model or metric that cannot be used is refused here, before the first generation.
        variants = with_models(variants, self.processing_class, load_target_model)
        self.variants = make_variants(self.target_model, self.args, self.metric.state(), variants)
        for variant in [*filter(None, self.variants), None]:
            with self.in_place(variant):
                trainable_parameters(self.target_model)
                with reading(self.target_model):
                    check_model(self.target_model)
                    self.metric.setup(self.target_model)
                self._check_rows()
        self.replay = None
        if replay_dataset is not None:
            loss = completion_only_loss, assistant_only_loss
            how = replay_ratio, self.args.seed, self.processing_class, self.args.max_length
            self.replay = Replay(replay_dataset, *how, *loss)

    def _check_rows(self) -> None:
        # A tokenizer may have tokens without a row in the model. Here only EOS is checked, other tokens are checked when they occur.
        rows, eos = vocab_size(self.target_model), self.processing_class.eos_token_id
        if eos is not None and eos >= rows:
            raise ValueError(
                f"`processing_class` has {len(self.processing_class)} tokens, but the target model only {rows} rows in its "
                f"input embedding, and none for EOS ({eos}): tokenizer and model do not belong together. Pass the target's own "
                "tokenizer (`target_processing_class` in the trainer)."
            )

    @contextmanager
    def in_place(self, variant: Variant | None) -> Iterator[None]:
        """Inside, a variant replaces the target's model, recipe and state of the metric. `None` is the recipe itself."""
        if variant is None:
            yield
            return
        own = self.target_model, self.args, self.metric.state()
        self.target_model, self.args = variant.model, variant.args
        self.metric.load_state(variant.metric_state)
        head = None if variant.head is None else variant.model.get_output_embeddings().weight
        if head is not None:
            own_head, head.data = head.data, variant.head.to(head.device)  # type: ignore[union-attr]
        try:
            yield
        finally:
            if head is not None:
                head.data = own_head
            variant.args, variant.metric_state = self.args, self.metric.state()
            self.target_model, self.args = own[:2]
            self.metric.load_state(own[2])

    def target_examples(
        self, prompts: list[str | Messages], completions: list[str | Messages], completion_ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        """
        Makes training examples of completions.

        Returns:
            `list[dict]`: Each has the fields of [`~trl_dpg.data.to_target_examples`]. It also has the text `completion`, its
                `completion_ids`, and whether it `ended`. `parts` are the texts that the generator wrote, and `places` come from
                [`~trl_dpg.data.repeated_places`]. `generated` is the mask of the tokens that the generator wrote, `length` their
                number.
        """
        masks = self.tool_masks or [[1] * len(ids) for ids in completion_ids]
        texts = [completion_text(completion) for completion in completions]
        parts = [completion_parts(completion) for completion in completions]
        if self.tool_masks is not None and self.generator_processing_class is not None:
            each = zip(completions, completion_ids, masks, strict=True)
            parts = [generated_parts(*one, self.generator_processing_class) for one in each]
            completions = [
                completion if completion_parts(completion) == own else with_parts(completion, own)
                for completion, own in zip(completions, parts, strict=True)
            ]
        ended = [len(ids) > 0 and ids[-1] in self.eos_token_ids for ids in completion_ids]
        loss = self.completion_only_loss, self.assistant_only_loss
        examples = to_target_examples(prompts, completions, ended, self.processing_class, self.formatting_func, *loss)
        places: list[list[tuple[int, int]]] = [[] for _ in examples]
        if self.formatting_func is not None:
            formatted = zip([example["text"] for example in examples], prompts, completions, strict=True)
            places = [repeated_places(*one, self._text) for one in formatted]
        columns = {
            "completion": texts,
            "completion_ids": completion_ids,
            "parts": parts,
            "places": places,
            "ended": ended,
            "generated": masks,
            "length": map(sum, masks),
        }
        rows = zip(*columns.values(), strict=True)
        return [
            {**example, **dict(zip(columns, row, strict=True))} for example, row in zip(examples, rows, strict=True)
        ]

    def _text(self, row: Row) -> str:
        """The text that the target reads for a prompt and a completion."""
        formatted = target_row(row["prompt"], row["completion"], self.formatting_func)
        return "" if formatted is None else row_text(formatted, self.processing_class, self.assistant_only_loss)

    def validate(self, examples: list[dict[str, Any]], device: torch.device) -> dict[str, float]:
        """
        Returns figures of an ordinary fine-tuning run, see [`~trl_dpg.validation.validate`]. Examples without a loss are left out.

        Held-out real examples are mixed in, if there are any. Figures of variants are named `variant_0_metric_gain`, ...
        """
        self.place_target(device)
        trained = [examples[i] for i in indices_to_train_on(examples, self.args.max_length)]
        if self.replay is not None:
            trained += self.replay.beside_in_validation(len(trained))

        def run(variant: Variant | None) -> dict[str, float]:
            with self.in_place(variant), measuring_nothing(self.metric):
                return validate(self.target_model, trained, self.metric, self.args)

        of_variants = [None if variant is None else run(variant) for variant in self.variants]
        figures = run(None)  # the last run, since the metric's picture shows the last one
        if self.variants == [None]:
            return figures
        named = {f"variant_{i}_{k}": v for i, of in enumerate(of_variants) for k, v in (of or figures).items()}
        return figures | named

    def state(self) -> dict[str, Any]:
        """The values measured so far, for a checkpoint."""
        state = {"adam_epsilon_root": self.args.adam_epsilon_root, "metric": self.metric.state()}
        of_variants = [variant and variant.state() for variant in self.variants]
        return state | ({"variants": of_variants} if any(of_variants) else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the result of [`~TargetFineTuning.state`], except for values that are now fixed by the recipe."""
        self.args = with_measured(self.args, state)
        self.metric.load_state(state["metric"])
        for variant, measured in zip(self.variants, state.get("variants", ()), strict=False):
            if variant is not None:
                variant.load_state(measured)

    def place_target(self, device: torch.device) -> None:
        """Moves the target and the models of variants to a device. Models there stay untouched, since quantized ones cannot be moved."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        for model in [self.target_model, *(variant.model for variant in self.variants if variant is not None)]:
            if next(model.parameters()).device != device:
                model.to(device)  # type: ignore[arg-type]


@contextmanager
def measuring_nothing(metric: Metric) -> Iterator[None]:
    """Restores the state of a metric on leaving, such as the `"auto"` scale of a pattern, which only training batches may set."""
    state = metric.state()
    try:
        yield
    finally:
        metric.load_state(state)
