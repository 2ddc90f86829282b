"""Work on the target model: finds its trained parameters, checks it, prepares it for a run and restores it afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel, PromptLearningConfig
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_pt_utils import get_parameter_names


if TYPE_CHECKING:
    from ..method.recipe import TargetTrainingArguments


TargetModel = PreTrainedModel | PeftModel


def vocab_size(model: TargetModel) -> int:
    """Number of rows of the input embedding, which PEFT may have wrapped."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def check_whole(model: TargetModel) -> None:
    """Raises a [`ValueError`] if a model is wrapped in another module, or if some of its weights are not on this process."""
    for name, module in model.named_modules():
        what = f"`{name}` of the target model" if name else "The target model"
        if is_compiled_module(module):
            raise ValueError(
                f"{what} is a wrapper that `torch.compile(...)` returned. Pass the module "
                "itself, and compile it in place (`model.compile()`)."
            )
        if isinstance(module, (nn.DataParallel, DistributedDataParallel, FullyShardedDataParallel)):
            raise ValueError(
                f"{what} is wrapped in {type(module).__name__}, which spreads it over devices. Unwrap the model, "
                "and pass an `accelerator`, which splits each batch over the processes."
            )
    for name, param in model.named_parameters():
        # DeepSpeed marks partitioned parameters by `ds_id`.
        if param.is_meta or hasattr(param, "ds_id"):
            where = "on the meta device" if param.is_meta else "partitioned by ZeRO-3"
            raise ValueError(
                f"The target model must have all of its weights, but {name!r} is {where}. Pass the target to the trainer by name, or "
                "load it inside `with trl_dpg.target.whole_weights():`. To shard the target, set `target_fsdp=True`, or use FSDP2's "
                "`fully_shard`."
            )


def trainable_parameters(model: TargetModel) -> list[nn.Parameter]:
    """
    Returns the trained parameters. Tied weights appear once, so that a step updates them once.

    Raises:
        [`ValueError`]: If there are none, or if they cannot be trained: wrapped, in half precision, or made under inference mode.
    """
    check_whole(model)
    if torch.is_inference_mode_enabled() or any(param.is_inference() for param in model.parameters()):
        what = "This was called" if torch.is_inference_mode_enabled() else "`model` was made or loaded"
        raise ValueError(
            f"{what} under `torch.inference_mode()`, where nothing can be trained. Do it outside, or under `torch.no_grad()`, "
            "which does not affect the training."
        )
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no trainable parameter: every `requires_grad` is False, as in a "
            "quantized or a frozen model. Train adapters on it (`target_peft_config=LoraConfig(...)` in the trainer, or "
            "`peft.get_peft_model`; an existing adapter must be loaded with `is_trainable=True`), or set `requires_grad` on "
            "the parameters to train."
        )
    device, dtype = params[0].device, params[0].dtype
    for name, param in model.named_parameters():
        what = f"`model` has the trainable parameter `{name}` in {param.dtype} on {param.device}"
        if param.requires_grad and param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{what}. This type is too coarse for metagradients: rounding would remove a step's update. Load the target with "
                "`dtype=torch.float32`."
            )
        if param.requires_grad and (param.device, param.dtype) != (device, dtype):
            raise ValueError(
                f"{what}, but other parameters are in {dtype} on {device}. Load the target on one device, in one dtype."
            )
    return params


_CHECKED: "WeakSet[nn.Module]" = WeakSet()


def check_model(model: TargetModel) -> None:
    """
    Raises a [`ValueError`] if metagradients of a model would be silently wrong. Refused are models that see the tokens they should
    predict, change their own weights in the forward pass, or have a wrong gradient (DoRA). Checks each model once.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"`model` is a {type(model).__name__}, which has no language-modeling head to compute a loss with. Load the "
            "target with `AutoModelForCausalLM.from_pretrained`."
        )
    if any(isinstance(module, DoraLinearLayer) for module in model.modules()):
        raise ValueError(
            "The target has DoRA adapters (`use_dora=True`). Their gradient is not the derivative of the loss, because PEFT detaches "
            "the norms of the adapted weights. Metagradients would be wrong. Use plain LoRA (`use_dora=False`)."
        )
    if model in _CHECKED:
        return
    config, name = model.config.get_text_config(), type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`model` is a {name}, an encoder-decoder: its encoder would see the labels. Load a causal language model with "
            "`AutoModelForCausalLM.from_pretrained`."
        )
    if config.model_type == "rwkv" and config.num_hidden_layers > config.rescale_every > 0:
        raise ValueError(
            f"`model` is a {name}, which changes its own parameters in evaluation mode (`config.rescale_every` is "
            f"{config.rescale_every}). Load it with `rescale_every=0`."
        )
    if config.model_type == "hrm_text":
        raise ValueError(
            f"`model` is a {name}, which computes a part of its forward pass without gradient. Its gradient is not the "
            "derivative of its loss, so metagradients would be wrong. Use another target model."
        )
    ids = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], device=next(model.parameters()).device)
    with restored(model), torch.no_grad():
        make_deterministic(model)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if logits.shape[1] != ids.shape[1]:
        raise ValueError(
            f"`model` ({name}) gives {logits.shape[1]} logits for {ids.shape[1]} tokens, as with prompt tuning, whose virtual "
            "tokens stand before the text. This is not supported: use another adapter (`LoraConfig`), or prefix tuning."
        )
    one, other = logits[:, :3].float()
    if not one.isfinite().all():
        return  # the run's own checks will report it
    if not torch.allclose(one, other, rtol=0, atol=1e-4 * one.abs().max().item()):
        raise ValueError(
            f"`model` is a {name} that is not causal: its predictions depend on later tokens, so it sees its labels. Load a "
            "causal language model. A model like BERT becomes causal with `is_decoder=True`."
        )
    _CHECKED.add(model)


def check_full_precision(model: TargetModel) -> None:
    """Raises a [`ValueError`] if a part of the model is in half precision, since rounding would hide differences of losses."""
    for name, param in model.named_parameters():
        if param.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"`curvature='central_difference'` needs float32, but `{name}` of `model` is in {param.dtype}: rounding would hide "
                'differences of losses. Load the target with `dtype=torch.float32`, or set `curvature="exact"`.'
            )


def is_compiled(model: TargetModel) -> bool:
    """Whether the model, or a part of it, was compiled by `.compile()`."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def check_positions(model: TargetModel, longest: int) -> None:
    """Raises a [`ValueError`] if the longest example has more tokens than the model has positions for them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    virtual = config.num_virtual_tokens if isinstance(config, PromptLearningConfig) else 0
    if limit is not None and 0 < limit < longest + virtual:
        beside = f", and {virtual} for its adapter's virtual tokens" if virtual else ""
        raise ValueError(
            f"An example has {longest} tokens{beside}, but `model` has {limit} positions "
            f"(`config.max_position_embeddings`). Set `max_length` to {limit - virtual} or less."
        )


def decayed_parameters(
    model: TargetModel, params: list[nn.Parameter], args: "TargetTrainingArguments"
) -> list[nn.Parameter]:
    """Those of `params` that weight decay applies to."""
    if args.weight_decay_on_norm_and_bias:
        return params
    # The rule of `Trainer.get_decay_parameter_names`, which cannot be called without a Trainer
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    names = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    return [p for name, p in model.named_parameters() if name in names and p.requires_grad]


def make_deterministic(model: TargetModel) -> None:
    """Turns dropout off. bitsandbytes layers stay in training mode, since in evaluation mode their CPU kernels have no derivative."""
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()


@contextmanager
def restored(model: TargetModel) -> Iterator[None]:
    """
    Restores buffers, every `.grad`, train/eval mode and the random state on leaving. Inside the context, every `.grad` starts as
    `None`: a caller's gradient must neither enter the run nor be changed by it.
    """
    device = next(model.parameters()).device
    grads = [(p, p.grad) for p in model.parameters()]
    for param, _ in grads:
        param.grad = None
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    modes = [(m, m.training) for m in model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, original in buffers:
                    setattr(module, name, buffer)  # the model may have replaced the buffer
                    buffer.copy_(original)
            for module, mode in modes:
                module.training = mode
            for param, grad in grads:
                param.grad = grad


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], replace: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces each module's `forward` by `replace(module.forward)`, and restores it on leaving."""
    hooked = [module.__dict__.get("forward") for module in modules]  # Accelerate's hooks set `forward` on the instance
    for module in modules:
        module.forward = replace(module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(modules, hooked, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]


@contextmanager
def checkpointed(model: TargetModel, enabled: bool) -> Iterator[None]:
    """If enabled, recomputes activations in the backward pass. Transformers' own switch needs training mode, which has dropout."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if enabled else []
    if enabled and not layers:
        raise ValueError(
            f"`gradient_checkpointing` is on, but `model` ({type(model).__name__}) has no layers that Transformers can "
            "checkpoint. Set `gradient_checkpointing=False`, and lower `micro_batch_size` to save memory."
        )
    with replaced_forwards(layers, lambda forward: partial(checkpoint, forward, use_reentrant=False)):
        yield


def is_checkpointed(model: nn.Module) -> bool:
    """Whether the model is inside the context [`checkpointed`] now."""
    return any(getattr(m.__dict__.get("forward"), "func", None) is checkpoint for m in model.modules())


@contextmanager
def twice_differentiable(model: TargetModel) -> Iterator[None]:
    """
    Makes a model use kernels that have a second derivative. SDPA uses its math kernel. Any other attention becomes eager attention. A
    compiled model runs uncompiled.
    """
    implementation = model.config._attn_implementation
    replaced = implementation not in (None, "eager", "sdpa")
    if replaced:
        model.set_attn_implementation("eager")
    stance = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    try:
        with sdpa_kernel(SDPBackend.MATH), stance:
            yield
    finally:
        if replaced:
            model.set_attn_implementation(implementation)
