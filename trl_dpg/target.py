"""Loading and preparing the target model."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import find_adapter_config_file

from .metagradients.runtime.memory import processes_here
from .metagradients.runtime.model import TargetModel, check_whole
from .metagradients.runtime.processes import failing_together
from .metagradients.runtime.sharding import is_in_shards


logger = logging.getLogger(__name__)


HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load_target_model(
    model: str | TargetModel,
    untie_head: bool = False,
    peft_config: PeftConfig | None = None,
    shard: bool = False,
    **model_init_kwargs: Any,
) -> TargetModel:
    """
    Loads a target model. Optionally unties its head, adds adapters or shards the model.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model id, directory, or a model, which is changed in place. For the id or directory of an adapter, the base model is
            loaded with this adapter, and only the adapter is trained.
        untie_head (`bool`, *optional*, defaults to `False`):
            Whether to give the LM head a weight of its own, see [`untie_lm_head`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            New adapters to train instead of the full model. The model must have no adapters yet.
        shard (`bool`, *optional*, defaults to `False`):
            Whether to split the model over all processes, see [`shard_target_model`], unless it is split already. The processes of a
            machine load the model one after another, so that the machine's memory holds one whole model at a time.
        **model_init_kwargs:
            Keyword arguments of `from_pretrained`. `dtype` is float32 and `trust_remote_code` is `False` unless given.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The model, whole (see [`whole_weights`]) or in shards.

    Raises:
        [`ValueError`]: If some weights of `model` are not on this process, or if `peft_config` is given but `model` has adapters.
    """
    if shard and (isinstance(model, str) or not is_in_shards(model)):
        return _load_in_turn(partial(load_target_model, model, untie_head, peft_config, **model_init_kwargs))
    adapter, adapter_kwargs = None, {}
    if isinstance(model, str):
        # Without `trust_remote_code`, no code of the model runs, and Transformers does not ask for permission at a prompt.
        model_init_kwargs = {"dtype": torch.float32, "trust_remote_code": False, **model_init_kwargs}
        adapter_kwargs = {name: model_init_kwargs[name] for name in HUB_KWARGS if name in model_init_kwargs}
        config = adapter_config(model, **adapter_kwargs)
        if config is not None:
            _check_adapter(model, peft_config)
            adapter, model = model, str(config.base_model_name_or_path)
            model_init_kwargs = {**model_init_kwargs, "revision": config.revision}
            model_init_kwargs.pop("subfolder", None)
    elif peft_config is not None and _has_adapters(model):
        raise ValueError(
            f"`target_model` ({type(model).__name__}) has adapters already, which new ones (`target_peft_config`) would "
            "replace. Leave `target_peft_config` out to train the existing adapters (load them with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`), or merge them first (`merge_and_unload`)."
        )
    with whole_weights():
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **model_init_kwargs)
        check_whole(model)
        if untie_head:
            untie_lm_head(model)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True, **adapter_kwargs)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    return model


def _load_in_turn(load: Callable[[], TargetModel]) -> TargetModel:
    """Makes the processes of a machine load a model and split it, one after another."""
    state = PartialState()
    if state.num_processes == 1:
        logger.warning("`target_fsdp` has no effect: there is only one process, which holds the whole target.")
        return load()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    model: Any = None
    for turn in range(processes_here(state.num_processes)):
        with failing_together(state):
            if turn == state.local_process_index:
                model = load()
                shard_target_model(model, mesh)
    return model


def shard_target_model(model: TargetModel, mesh: DeviceMesh) -> None:
    """
    Splits a model in place by [`~torch.distributed.fsdp.fully_shard`], layer by layer. Processes do not communicate for this.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The whole model, the same on every process.
        mesh ([`~torch.distributed.device_mesh.DeviceMesh`]): The processes, as a mesh of one dimension.

    Raises:
        [`ValueError`]: If the model is quantized.
    """
    for name, param in model.named_parameters():
        if not param.is_floating_point():
            raise ValueError(
                f"`target_fsdp=True` does not go with a quantized target: its parameter {name!r} is in {param.dtype}. Load the target "
                "without `quantization_config`, or set `target_fsdp=False`."
            )
    for module in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def adapter_config(name: str, **hub_kwargs: Any) -> PeftConfig | None:
    """The configuration of an adapter, from its id or directory. `None` for a model."""
    try:
        if find_adapter_config_file(name, **hub_kwargs) is None:
            return None
    except (OSError, ValueError):
        return None  # if the name is wrong, loading the model raises a better error
    config = PeftConfig.from_pretrained(name, **hub_kwargs)
    if config.base_model_name_or_path is None:
        raise ValueError(
            f"The adapter {name!r} does not name its base model. Put the model's name into `adapter_config.json`, as "
            "`base_model_name_or_path`."
        )
    return config


def _check_adapter(name: str, peft_config: PeftConfig | None) -> None:
    if peft_config is not None:
        raise ValueError(
            f"`target_model` {name!r} is an adapter, which new ones (`target_peft_config`) would replace. Leave "
            "`target_peft_config` out to train this adapter further, or merge it into its model first "
            "(`merge_and_unload`)."
        )
    if os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(
            f"`target_model` {name!r} holds a model (`config.json`) and an adapter (`adapter_config.json`): it is not clear "
            "which of them to train. Keep them in two directories."
        )


def _has_adapters(model: TargetModel) -> bool:
    # Adapters that Transformers adds do not change the model's class.
    return isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextmanager
def whole_weights() -> Iterator[None]:
    """
    Makes `from_pretrained` load all weights on every process, no matter how the generator is trained.

    Once a `TrainingArguments` exists, Transformers assumes that Accelerate will prepare every model that it loads. With
    DeepSpeed ZeRO-3, each process then gets only a part of the weights. With FSDP's `cpu_ram_efficient_loading`, only the first
    process of a machine is sure to get them. But the target is never prepared, so it needs all weights.

    Example:

    ```python
    from transformers import AutoModelForCausalLM
    from trl_dpg.target import whole_weights

    with whole_weights():
        target_model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2", dtype="float32")
    ```
    """
    zero3 = hf_deepspeed._hf_deepspeed_config_weak_ref
    efficient_loading = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    hf_deepspeed.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = zero3
        if efficient_loading is None:
            del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient_loading


def load_target_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """
    Loads the tokenizer of a target model from its id or directory. For an adapter without a tokenizer, loads that of its base model.

    `kwargs` are those of `from_pretrained`. Raises a [`ValueError`] if there is no tokenizer.
    """
    kwargs.setdefault("trust_remote_code", False)
    error: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as e:
        error = e
    # Without tokenizer files, Transformers makes a tokenizer that has special tokens only.
    if error is not None or len(tokenizer) <= len(tokenizer.all_special_ids):
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        config = adapter_config(name, **hub_kwargs)
        if config is not None:
            return load_target_tokenizer(
                str(config.base_model_name_or_path), **{**kwargs, "revision": config.revision}
            )
        raise ValueError(
            f"`processing_class` is missing, and no tokenizer could be loaded from the target's name {name!r}. Check the name, or pass the "
            f"target's tokenizer (`target_processing_class` in the trainer).{f' {error}' if error else ''}"
        ) from error
    return tokenizer


def untie_lm_head(model: TargetModel) -> None:
    """
    Gives the LM head its own copy of the weight that it shares with the input embedding, in place.

    The model's outputs do not change, but the two weights are now trained and saved separately. A head that is not tied stays as it
    is. Add adapters afterwards, not before.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            "`model` has adapters on top of a tied head, which can no longer be untied. Call `untie_lm_head` on the base model "
            "before `get_peft_model`, or pass the base model with `target_peft_config` and `target_untie_lm_head=True`."
        )
    weight: torch.Tensor = head.weight  # type: ignore[assignment]
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    # `save_pretrained` and `tie_weights` read these attributes.
    model._tied_weights_keys = None  # type: ignore[assignment]
    model.all_tied_weights_keys = {}
