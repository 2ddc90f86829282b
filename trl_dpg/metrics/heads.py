"""The LM head of a model, with or without a wrapper of PEFT."""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn


def get_lm_head(model: nn.Module) -> Any:
    """
    The module that maps hidden states to logits, with its PEFT wrapper if it has one.

    Raises:
        [`ValueError`]: If the model has no LM head.
    """
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        raise ValueError(
            f"`target_model` is a {type(model).__name__}, which has no LM head (`get_output_embeddings()` gives none). "
            "Load it with `AutoModelForCausalLM.from_pretrained(...)`."
        )
    return head


def input_embedding_weight(model: nn.Module) -> torch.Tensor:
    """Weight of the input embedding, shape `(vocab_size, hidden_size)`. The update of a LoRA layer is not in it."""
    return model.get_input_embeddings().weight  # type: ignore[operator]


def lm_head_weight(model: nn.Module) -> torch.Tensor:
    """
    The effective weight of the LM head, shape `(vocab_size, hidden_size)`, differentiable in the parameters that it is made of.

    For a plain linear layer, this is its weight. For a layer in PEFT's `modules_to_save`, it is the weight of the active copy. For a
    LoRA layer, it is the base weight plus the update of every active adapter.

    Raises:
        [`ValueError`]: If the model has no LM head, or if its effective weight cannot be computed (an adapter other than plain
            LoRA, or a quantized layer).
    """
    head = get_lm_head(model)
    # For any other wrapper, `.weight` is the base weight. It has the right shape, but silently the wrong values.
    foreign = isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(
        head, (LoraLinear, ModulesToSaveWrapper)
    )
    variant = isinstance(head, LoraLinear) and len(head.lora_variant) > 0
    weight = head.weight
    if foreign or variant or not weight.is_floating_point():
        raise ValueError(
            f"The effective weight of the LM head of `target_model` cannot be computed: the head is a "
            f"{type(head).__module__}.{type(head).__name__} with a weight of dtype {weight.dtype}. Train an unquantized "
            "head directly, with plain LoRA (no DoRA or other variant), or with `modules_to_save=['lm_head']`."
        )
    if isinstance(head, LoraLinear) and not head.disable_adapters and not head.merged:
        for adapter in head.active_adapters:
            if adapter in head.lora_A:
                weight = weight + head.get_delta_weight(adapter)
    return weight


def is_lm_head_tied(model: nn.Module) -> bool:
    """
    Whether the LM head and the input embedding share one parameter, as in GPT-2, SmolLM2 and Llama-3.2-1B.

    A head in PEFT's `modules_to_save` is a separate copy, so it is not tied. For a LoRA layer, the base weight counts.
    """
    return get_lm_head(model).weight is input_embedding_weight(model)
