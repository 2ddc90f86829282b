"""The target model as the engine sees it: what is trained, what is checked, and what is put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from .arguments import TargetTrainingArguments


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """
    Parameters that are trained, each distinct one once, so that tied weights are not updated twice.

    Raises:
        [`ValueError`]: If the model has no language-modeling head, nothing to train, or half-precision parameters to train.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"`model` is a {type(model).__name__}, which has no language-modeling head to compute a loss with. Load the "
            "target with `AutoModelForCausalLM.from_pretrained`."
        )
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no trainable parameter: every `requires_grad` is False, as in a "
            "quantized or a frozen model. Train adapters on it (`target_peft_config=LoraConfig(...)` in the trainer, or "
            "`peft.get_peft_model`), or set `requires_grad` on what is to be trained."
        )
    for name, param in model.named_parameters():
        if param.requires_grad and param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`model` has the trainable parameter `{name}` in {param.dtype}, too coarse for metagradients: a step's "
                "update would be rounded away. Load the target with `dtype=torch.float32`."
            )
    return params


def check_positions(model: nn.Module, longest: int) -> None:
    """Raises a [`ValueError`] if the longest example has more tokens than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"An example has {longest} tokens, but `model` has {limit} positions (`config.max_position_embeddings`). Set "
            f"`max_length` to {limit} or less."
        )


def decayed_parameters(
    model: nn.Module, params: list[nn.Parameter], args: TargetTrainingArguments
) -> list[nn.Parameter]:
    """Which of `params` weight decay applies to."""
    if args.weight_decay_on_norm_and_bias:
        return params
    # the rule of `Trainer.get_decay_parameter_names`, which needs a Trainer
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    names = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    return [p for name, p in model.named_parameters() if name in names and p.requires_grad]


@contextmanager
def restored(model: nn.Module, params: list[nn.Parameter]) -> Iterator[None]:
    """Puts parameters, buffers, train/eval mode and the random state back on leaving."""
    originals = [p.detach().clone() for p in params]
    buffers = [(b, b.clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    devices = [params[0].device] if params[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for param, original in zip(params, originals, strict=True):
                    param.copy_(original)
                for buffer, original in buffers:
                    buffer.copy_(original)
            for module, mode in modes:
                module.training = mode
