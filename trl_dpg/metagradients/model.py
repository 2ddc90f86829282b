"""The target model as the engine sees it: what is trained, what is checked, and what is put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_parameter_names

from .arguments import TargetTrainingArguments


TargetModel = PreTrainedModel | PeftModel


def vocab_size(model: TargetModel) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[return-value]


def trainable_parameters(model: TargetModel) -> list[nn.Parameter]:
    """
    Parameters that are trained, each distinct one once, so that tied weights are not updated twice.

    Raises:
        [`ValueError`]: If the model has no language-modeling head, nothing to train, or half-precision parameters to train.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
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


def check_positions(model: TargetModel, longest: int) -> None:
    """Raises a [`ValueError`] if the longest example has more tokens than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"An example has {longest} tokens, but `model` has {limit} positions (`config.max_position_embeddings`). Set "
            f"`max_length` to {limit} or less."
        )


def decayed_parameters(
    model: TargetModel, params: list[nn.Parameter], args: TargetTrainingArguments
) -> list[nn.Parameter]:
    """Which of `params` weight decay applies to."""
    if args.weight_decay_on_norm_and_bias:
        return params
    # the rule of `Trainer.get_decay_parameter_names`, which needs a Trainer
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    names = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    return [p for name, p in model.named_parameters() if name in names and p.requires_grad]


def make_deterministic(model: TargetModel) -> None:
    """
    Turns dropout off, as in evaluation.

    bitsandbytes layers stay in training mode: out of it they use kernels on the CPU that have no derivative.
    """
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()


@contextmanager
def restored(model: TargetModel, params: list[nn.Parameter]) -> Iterator[None]:
    """Puts parameters, their `.grad`, buffers, train/eval mode and the random state back on leaving."""
    originals = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    for param in params:
        param.grad = None  # a caller's gradient must neither enter the run nor be changed by it
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
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            for module, mode in modes:
                module.training = mode
