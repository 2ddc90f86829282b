"""Variants of the target's recipe. The reward is the mean over them, so that the data works in all variants."""

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
    A recipe, its model, and the values measured in its runs.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`): The model to fine-tune.
        args (`TargetTrainingArguments`): The recipe.
        metric_state (`dict`): State of the metric from runs of this model with this recipe.
        head (`Tensor`, *optional*): Weight that replaces the LM head's own.
    """

    model: TargetModel
    args: TargetTrainingArguments
    metric_state: dict[str, Any]
    head: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """The values measured so far, for a checkpoint."""
        args = self.args
        return {
            "adam_epsilon_root": args.adam_epsilon_root,
            "metric": self.metric_state,
            "micro_batch_size": args.micro_batch_size,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the result of [`~Variant.state`], except for values that are now fixed by the recipe."""
        self.args = with_measured(self.args, state)
        self.metric_state = state["metric"]


def with_measured(recipe: TargetTrainingArguments, state: dict[str, Any]) -> TargetTrainingArguments:
    """A recipe with the values that a checkpoint holds: an epsilon for `"auto"`, and micro-batches halved where memory ran out."""
    root = state["adam_epsilon_root"] if recipe.adam_epsilon_root == "auto" else recipe.adam_epsilon_root
    sizes = [size for size in (recipe.micro_batch_size, state.get("micro_batch_size")) if size is not None]
    return replace(recipe, adam_epsilon_root=root, micro_batch_size=min(sizes, default=None))


def variant_recipes(
    recipe: TargetTrainingArguments, variants: Any, name: str = "variants"
) -> list[TargetTrainingArguments]:
    """
    Makes the recipe of each variant.

    Raises:
        [`ValueError`]: If a variant is no dict, has an unknown field, or a field out of its range. Messages call the variants `name`.
    """
    if variants is None:
        return []
    if not isinstance(variants, list) or not variants or not all(isinstance(variant, dict) for variant in variants):
        raise ValueError(
            f"`{name}` must be a list of one or more dicts of changes to the recipe, got {variants!r:.80}. Write for example "
            "'[{}, {\"learning_rate\": 1e-4}]'; an empty dict is the recipe itself."
        )
    recipes = []
    for i, variant in enumerate(variants):
        changes = {field: value for field, value in variant.items() if field not in OTHER_FIELDS}
        if unknown := sorted(changes.keys() - RECIPE_FIELDS):
            raise ValueError(
                f"`{name}[{i}]` has the unknown field {unknown[0]!r}. Give fields of `TargetTrainingArguments` (without `target_`), "
                f"{' or '.join(map(repr, OTHER_FIELDS))}."
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
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """The variants with loaded models in place of names. Each model is loaded once, and must have the target's vocabulary."""
    models: dict[str, TargetModel] = {}
    for name in dict.fromkeys(variant.get("model") for variant in variants or []):
        if not isinstance(name, str):
            continue
        vocabulary = processing_class and processing_class.get_vocab()
        if vocabulary and vocabulary != load_target_tokenizer(name, trust_remote_code=trust_remote_code).get_vocab():
            raise ValueError(
                f"`model` {name!r} of a variant has another vocabulary than the target, so it would misread the target's tokens. Use a "
                "model with the target's tokenizer."
            )
        models[name] = load(name)
    return [
        {**variant, "model": models[variant["model"]]} if isinstance(variant.get("model"), str) else variant
        for variant in variants or []
    ]


def make_variants(
    target: TargetModel, recipe: TargetTrainingArguments, metric_state: dict[str, Any], variants: list[dict[str, Any]]
) -> list[Variant | None]:
    """Makes a [`Variant`] of each dict. An empty dict becomes `None`, which stands for the recipe itself."""
    made: list[Variant | None] = []
    for args, variant in zip(variant_recipes(recipe, variants or [{}]), variants or [{}], strict=True):
        model = variant.get("model", target)
        head = random_head(model, variant["head_seed"]) if "head_seed" in variant else None
        made.append(Variant(model, args, metric_state, head) if variant else None)
    return made


def random_head(model: TargetModel, seed: int) -> Tensor:
    """A random weight for the LM head, whose entries have the standard deviation of the model's own head."""
    weight = get_lm_head(model).weight
    if is_lm_head_tied(model) or not weight.is_floating_point():
        raise ValueError(
            f"`head_seed` {seed} asks for a new LM head, but the target's head is tied to its input embedding, or quantized. Untie "
            "it (`target_untie_lm_head=True` in the trainer, otherwise `trl_dpg.untie_lm_head(model)`), or leave `head_seed` out."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape, generator=generator).to(weight) * weight.detach().std()
