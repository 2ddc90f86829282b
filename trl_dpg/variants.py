"""Variants of the target's fine-tuning: the reward is the mean over them, so that data works in each."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .metagradients import TargetTrainingArguments
from .metagradients.runtime.model import TargetModel
from .metrics.heads import get_lm_head, is_lm_head_tied
from .target import load_target_tokenizer


RECIPE_FIELDS = {field.name for field in fields(TargetTrainingArguments)}
OTHER_FIELDS = ("model", "head_seed")


@dataclass
class Variant:
    """
    A recipe, the model that it is for, and what was measured in its runs.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`): What is fine-tuned.
        args (`TargetTrainingArguments`): The recipe.
        metric_state (`dict`): What the metric measured on this model with this recipe.
        head (`Tensor`, *optional*): The LM head's weight in place of the model's own.
    """

    model: TargetModel
    args: TargetTrainingArguments
    metric_state: dict[str, Any]
    head: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """What was measured so far, for a checkpoint."""
        args = self.args
        return {
            "adam_epsilon_root": args.adam_epsilon_root,
            "metric": self.metric_state,
            "micro_batch_size": args.micro_batch_size,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what [`~Variant.state`] gave, where this run measures it too."""
        if self.args.adam_epsilon_root == "auto":
            self.args = replace(self.args, adam_epsilon_root=state["adam_epsilon_root"])
        sizes = [size for size in (self.args.micro_batch_size, state["micro_batch_size"]) if size is not None]
        self.args = replace(self.args, micro_batch_size=min(sizes, default=None))
        self.metric_state = state["metric"]


def variant_recipes(
    recipe: TargetTrainingArguments, variants: Any, name: str = "variants"
) -> list[TargetTrainingArguments]:
    """
    The recipe with the changes of each variant.

    Raises:
        [`ValueError`]: If a variant is no dict, has an unknown field, or one that is out of its range. It says which, by `name`.
    """
    if variants is None:
        return []
    if not isinstance(variants, list) or not variants or not all(isinstance(variant, dict) for variant in variants):
        raise ValueError(
            f"`{name}` must be a list of one or more dicts of changes to the recipe, got {variants!r:.80}. Write it as "
            "'[{}, {\"learning_rate\": 1e-4}]'; an empty one is the recipe itself."
        )
    recipes = []
    for i, variant in enumerate(variants):
        changes = {field: value for field, value in variant.items() if field not in OTHER_FIELDS}
        if unknown := sorted(changes.keys() - RECIPE_FIELDS):
            raise ValueError(
                f"`{name}[{i}]` has the unknown field {unknown[0]!r}. It may have those of `TargetTrainingArguments` (without "
                f"`target_`) and {' and '.join(map(repr, OTHER_FIELDS))}."
            )
        seed = variant.get("head_seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"`{name}[{i}]` needs a `head_seed` that is a whole number from 0 on, got {seed!r}.")
        if not isinstance(variant.get("model", ""), (str, nn.Module)):
            raise ValueError(
                f"`{name}[{i}]` needs a `model` that is a name or a directory, got {variant['model']!r:.80}."
            )
        try:
            recipes.append(replace(recipe, **changes))
        except ValueError as error:
            raise ValueError(f"`{name}[{i}]`: {error}") from error
    return recipes


def with_models(
    variants: list[dict[str, Any]] | None,
    processing_class: PreTrainedTokenizerBase | None,
    load: Callable[[str], TargetModel],
) -> list[dict[str, Any]]:
    """The variants with models in place of names. Each is loaded once, and must have the target's vocabulary."""
    models: dict[str, TargetModel] = {}
    for name in dict.fromkeys(variant.get("model") for variant in variants or []):
        if not isinstance(name, str):
            continue
        if processing_class and load_target_tokenizer(name).get_vocab() != processing_class.get_vocab():
            raise ValueError(
                f"`model` {name!r} of a variant has another vocabulary than the target, so the tokens of a text mean something else to "
                "it. Take a model with the target's tokenizer."
            )
        models[name] = load(name)
    return [
        {**variant, "model": models[variant["model"]]} if isinstance(variant.get("model"), str) else variant
        for variant in variants or []
    ]


def make_variants(
    target: TargetModel, recipe: TargetTrainingArguments, metric_state: dict[str, Any], variants: list[dict[str, Any]]
) -> list[Variant | None]:
    """The variants, with models in place of names; `None` is the recipe itself."""
    made: list[Variant | None] = []
    for args, variant in zip(variant_recipes(recipe, variants or [{}]), variants or [{}], strict=True):
        model = variant.get("model", target)
        head = random_head(model, variant["head_seed"]) if "head_seed" in variant else None
        made.append(Variant(model, args, metric_state, head) if variant else None)
    return made


def random_head(model: TargetModel, seed: int) -> Tensor:
    """A weight for the LM head with random entries of the same spread as the model's own."""
    weight = get_lm_head(model).weight
    if is_lm_head_tied(model) or not weight.is_floating_point():
        raise ValueError(
            f"`head_seed` {seed} asks for a new LM head, but that of the target is tied to its input embedding, or quantized. Untie "
            "it (`target_untie_lm_head=True` in the trainer, `trl_dpg.untie_lm_head(model)` else), or leave out `head_seed`."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape, generator=generator).to(weight) * weight.detach().std()
