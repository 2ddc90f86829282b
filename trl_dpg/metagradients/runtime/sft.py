"""Which recipe a configuration of stock SFT describes."""

from typing import TYPE_CHECKING, Any

from transformers import SchedulerType


if TYPE_CHECKING:
    from trl import SFTConfig


def recipe_of_sft(config: "SFTConfig", overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of [`~trl_dpg.metagradients.TargetTrainingArguments`], see its `from_sft_config`."""
    unsupported = {
        "optim": config.optim not in ("adamw_torch", "adamw_torch_fused", "sgd"),
        "max_steps": config.max_steps > 0,
        "num_train_epochs": config.num_train_epochs != int(config.num_train_epochs),
        "packing": config.packing,
        "padding_free": config.padding_free,
        "assistant_only_loss": config.assistant_only_loss,
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
    for name, is_unsupported in unsupported.items():
        if is_unsupported and name not in overrides:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` of the SFT configuration cannot be expressed as a "
                f"`TargetTrainingArguments`. Change it in the SFT configuration, or pass `{name}=...` here if it is "
                "one of this class's fields."
            )
    scheduler = overrides.get("lr_scheduler_type", SchedulerType(config.lr_scheduler_type).value)
    fields = {
        "optim": "sgd" if config.optim == "sgd" else "adamw",
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "weight_decay_on_norm_and_bias": False,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "adam_epsilon_root": 0.0,
        "lr_scheduler_type": scheduler,
        "warmup_steps": 0 if scheduler == "constant" else config.warmup_steps,  # which ignores it
        "max_grad_norm": config.max_grad_norm or 0.0,
        "num_train_epochs": int(config.num_train_epochs),
        "batch_size": config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "micro_batch_size": config.train_batch_size,
        "max_length": config.max_length,
        "shuffle": config.shuffle_dataset or config.train_sampling_strategy == "random",
        "seed": config.seed,
        "loss_normalization": "batch_tokens",
    }
    return {**fields, **overrides}
