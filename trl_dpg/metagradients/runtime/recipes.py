"""Checks of a recipe's fields, and the recipe of a TRL `SFTConfig`."""

import math
import os
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from transformers import SchedulerType


if TYPE_CHECKING:
    from trl import SFTConfig

    from ..method.recipe import TargetTrainingArguments


NOT_NEGATIVE = "a finite number of at least 0", lambda x: 0 <= x < math.inf
FRACTION = "a number in [0, 1)", lambda x: 0 <= x < 1
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("a finite number above 0", lambda x: 0 < x < math.inf),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("max_grad_norm", "curvature_tolerance"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), FRACTION),
    "adam_epsilon_root": (f'"auto" or {NOT_NEGATIVE[0]}', NOT_NEGATIVE[1]),
    "momentum": (f"None or {FRACTION[0]}", FRACTION[1]),
}
WHOLE_NUMBERS: dict[str, tuple[str, int]] = {
    "batch_size": ("a whole number of at least 1", 1),
    "num_train_epochs": ("a whole number of at least 1", 1),
    "max_length": ("a whole number of at least 2", 2),
    "seed": ("a whole number from 0 to 2**64 - 1", 0),
    "micro_batch_size": ("None or a whole number of at least 1", 1),
    "micro_batch_tokens": ("None or a whole number of at least 1", 1),
}

# Fields that say where and how a run is computed. They change its result by no more than rounding.
NOT_IN_THE_RESULT = "tape tape_dir micro_batch_size micro_batch_tokens gradient_checkpointing disable_tqdm".split()

# Fields that an `SFTConfig` has by the same name
SAME_FIELDS = "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_length seed".split()


def checked(recipe: "TargetTrainingArguments") -> dict[str, int]:
    """
    Checks a recipe. Returns its whole-number fields as `int`, since 8.0 is accepted for 8.

    Raises:
        [`ValueError`]: If a field is out of its range, or if two fields contradict each other.
    """
    for field in fields(recipe):
        value, choices = getattr(recipe, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            raise ValueError(f"`{field.name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"`{field.name}` must be True or False, got {value!r}.")
    if not (recipe.nesterov is None or isinstance(recipe.nesterov, bool)):
        raise ValueError(f"`nesterov` must be None, True or False, got {recipe.nesterov!r}.")
    for name, (requirement, holds) in NUMBERS.items():
        if (name, getattr(recipe, name)) not in (("adam_epsilon_root", "auto"), ("momentum", None)):
            _require(name, getattr(recipe, name), requirement, holds)
    whole = {name: getattr(recipe, name) for name in WHOLE_NUMBERS}
    whole = {name: value for name, value in whole.items() if value is not None or not name.startswith("micro_batch")}
    for name, value in whole.items():
        requirement, least = WHOLE_NUMBERS[name]
        _require(name, value, requirement, _is_whole_from(least))
    if recipe.tape_dir is not None and not (isinstance(recipe.tape_dir, str) and os.path.isdir(recipe.tape_dir)):
        raise ValueError(f"`tape_dir` must be None or an existing directory, got {recipe.tape_dir!r}. Create it.")
    _check_combinations(recipe)
    return {name: int(value) for name, value in whole.items()}


def _is_whole_from(least: int) -> Callable[[float], bool]:
    return lambda x: least <= x < 2**64 and float(x).is_integer()


def _require(name: str, value: Any, requirement: str, holds: Callable[[float], bool]) -> None:
    # The usual cause of a wrong type is `1e-6` in YAML, which arrives as a string.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"`{name}` must be {requirement}, got {value!r} of type {type(value).__name__}. Give a number; in YAML, "
            "write 1.0e-6, since some parsers read 1e-6 as text."
        )
    if not holds(value):
        raise ValueError(f"`{name}` must be {requirement}, got {value!r}.")


def _check_combinations(recipe: "TargetTrainingArguments") -> None:
    if recipe.rule_class.needs_epsilon_root and recipe.adam_epsilon == 0 and recipe.adam_epsilon_root == 0:
        raise ValueError(
            "`adam_epsilon` and `adam_epsilon_root` are both 0, so AdamW divides by zero wherever a gradient is zero. Set "
            "`adam_epsilon_root`, for example to 1e-9."
        )
    if recipe.nesterov and recipe.optim == "sgd" and not recipe.momentum:
        raise ValueError("`nesterov=True` needs a `momentum` above 0 with SGD. Set it, for example to 0.9.")
    if recipe.optim == "adamw" and (recipe.momentum is not None or recipe.nesterov is not None):
        raise ValueError(
            f'`momentum` {recipe.momentum} and `nesterov` {recipe.nesterov} are settings of "sgd" and "muon". With "adamw", set '
            "`adam_beta1`."
        )
    if recipe.lr_scheduler_type == "constant" and recipe.warmup_steps > 0:
        raise ValueError(
            f"`warmup_steps` {recipe.warmup_steps!r} has no effect, as `lr_scheduler_type` is 'constant'. Set the "
            "scheduler to 'constant_with_warmup', or leave the warm-up out."
        )
    if recipe.bf16 and recipe.curvature == "central_difference":
        raise ValueError(
            "`bf16=True` and `curvature='central_difference'` do not go together: rounding to bfloat16 would hide differences "
            'of losses. Set `bf16=False`, or `curvature="exact"`.'
        )


def recipe_of_sft(config: "SFTConfig", overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of [`~trl_dpg.metagradients.TargetTrainingArguments`] for its `from_sft_config`."""
    unsupported = {
        "optim": config.optim not in ("adamw_torch", "adamw_torch_fused", "sgd"),
        "max_steps": config.max_steps > 0,
        "num_train_epochs": config.num_train_epochs != int(config.num_train_epochs),
        "packing": config.packing,
        "padding_free": config.padding_free,
        "loss_type": config.loss_type not in ("nll", "chunked_nll"),
        "truncation_mode": config.truncation_mode != "keep_start",
        "max_length": config.max_length is None,
        "label_smoothing_factor": config.label_smoothing_factor != 0,
        "neftune_noise_alpha": config.neftune_noise_alpha is not None,
        "dataloader_drop_last": config.dataloader_drop_last,
        "lr_scheduler_kwargs": bool(config.lr_scheduler_kwargs),
        "optim_args": bool(config.optim_args),
        "router_aux_loss_coef": bool(config.router_aux_loss_coef),
        "accelerator_config": config.accelerator_config.split_batches,  # type: ignore[union-attr]
        "train_sampling_strategy": config.train_sampling_strategy not in ("random", "sequential")
        and "shuffle" not in overrides,
    }
    of_texts = {
        "completion_only_loss": config.completion_only_loss is False,
        "assistant_only_loss": config.assistant_only_loss,
    }
    for name, is_set in of_texts.items():
        if is_set and name not in overrides:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` of the SFT configuration says which tokens have a loss. The recipe does not decide "
                f"that, but the tokenization does: set `target_{name}` of the trainer, or `{name}` of `MetagradientReward` or "
                f"`dataset_examples`. Then pass `{name}=None` here."
            )
    overrides = {name: value for name, value in overrides.items() if name not in of_texts}
    for name, is_unsupported in unsupported.items():
        if is_unsupported and name not in overrides:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` of the SFT configuration cannot be expressed in "
                f"`TargetTrainingArguments`. Change it in the SFT configuration, or pass `{name}=...` here if "
                "`TargetTrainingArguments` has this field."
            )
    scheduler = overrides.get("lr_scheduler_type", SchedulerType(config.lr_scheduler_type).value)
    values = {
        "optim": "sgd" if config.optim == "sgd" else "adamw",
        **{name: getattr(config, name) for name in SAME_FIELDS},
        "weight_decay_on_norm_and_bias": False,
        "adam_epsilon_root": 0.0,
        "lr_scheduler_type": scheduler,
        "warmup_steps": 0 if scheduler == "constant" else config.warmup_steps,  # which ignores them
        "max_grad_norm": config.max_grad_norm or 0.0,
        "num_train_epochs": int(config.num_train_epochs),
        "batch_size": config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "micro_batch_size": config.train_batch_size,
        "shuffle": config.shuffle_dataset or config.train_sampling_strategy == "random",
        "loss_normalization": "batch_tokens",
    }
    return {**values, **overrides}
