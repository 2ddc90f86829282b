"""Facts about a run that may be published: no path, no token, and nothing of the machine's environment."""

import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from ..metagradients import TargetTrainingArguments
from ..metagradients.metric import description
from ..metagradients.runtime.host import host_memory
from ..metagradients.runtime.recipes import NOT_IN_THE_RESULT
from .client import API


FACTS_FILE = "dpg.json"  # lies beside a generator; cards of the generator and of its data sets are made of it
_OF_THE_LOOP = {"runtime", "samples_per_second", "steps_per_second", "num_tokens"}


def describe_model(model: Any) -> dict[str, Any]:
    """
    Describes a model without its path on this machine. `name` is the id on the Hub, or the last part of a local path. Further fields
    are `on_hub`, `architecture` and `parameters`, the number of parameters without adapters.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name, on_hub = public_name(base.config._name_or_path)
    of_adapters = {
        f"{path}.{layer}"
        for path, module in base.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for layer in module.adapter_layer_names
    }
    parameters = [
        parameter
        for path, parameter in base.named_parameters()
        if of_adapters.isdisjoint(accumulate(path.split("."), "{}.{}".format))
    ]
    return {
        "name": name,
        "on_hub": on_hub,
        "architecture": type(base).__name__.removeprefix("FSDP"),  # `fully_shard` adds this prefix
        "parameters": sum(_size(parameter) for parameter in parameters),
    }


def _size(parameter: Any) -> int:
    """Number of a parameter's weights, even if it holds only a part (DeepSpeed) or several weights in a byte (4 bits)."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    quantization = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantization is None else math.prod(quantization.shape)


def public_name(name: str) -> tuple[str | None, bool]:
    """
    The part of a model's or data set's name or path that may be published. For an id on the Hub, this is the id, with `True`. For a
    path, it is its last part (`None` for an empty name), with `False`.

    Example:

    ```python
    >>> public_name("openai-community/gpt2"), public_name("/home/me/models/gpt2/"), public_name("")
    (('openai-community/gpt2', True), ('gpt2', False), (None, False))

    ```
    """
    if not name:
        return None, False
    if cached := re.search(r"models--([^/]+)/snapshots/", name):  # in the Hub's cache
        return cached[1].replace("--", "/"), True
    is_path = os.path.exists(name) or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return (Path(name.replace("\\", "/")).name or None, False) if is_path else (name, True)


def summarize_validation(history: Sequence[dict[str, Any]], best_step: int | None = None) -> dict[str, Any]:
    """
    Summarizes validation before and after training, as means over draws.

    Args:
        history (`Sequence[dict]`):
            `trainer.state.log_history`.
        best_step (`int`, *optional*):
            Step of the checkpoint that was loaded at the end of training (`load_best_model_at_end`). Then `after` is this model,
            not that of the last validated step.

    Returns:
        `dict[str, Any]`: Maps the name of the validation data (`"eval"`, or `"eval_NAME"` for several) to `before` and `after`.
        `before` is the first validated step, or `None` if `after` is the same step. Each of the two has `step`, `draws`, and for
        every read-out `mean` (`None` if a draw was not finite) and `standard_error` (of the mean; empty for one draw).

    Example:

    ```python
    >>> history = [
    ...     {"step": 0, "eval_metric_gain": 0.5},
    ...     {"step": 8, "eval_metric_gain": 1.0},
    ...     {"step": 8, "eval_metric_gain": 3.0},
    ... ]
    >>> summarize_validation(history)["eval"]["after"]
    {'step': 8, 'draws': 2, 'mean': {'metric_gain': 2.0}, 'standard_error': {'metric_gain': 1.0}}

    ```
    """
    end_of_training = [index for index, row in enumerate(history) if "train_runtime" in row]
    summary: dict[str, Any] = {}
    for prefix in validation_names(history):
        indices = [i for i, row in enumerate(history) if f"{prefix}_metric_gain" in row]
        rows = [history[i] for i in indices]
        first, last = rows[0]["step"], rows[-1]["step"]
        after = [row for row in rows if row["step"] == last]
        if best_step is not None and end_of_training:
            after = [history[i] for i in indices if i > end_of_training[-1]]
            after = after or [row for row in rows if row["step"] == best_step]
        before = [row for row in rows if row["step"] == first]
        summary[prefix] = {
            "before": _means(before, prefix) if first != after[0]["step"] else None,
            "after": _means(after, prefix),
        }
    return summary


def validation_names(history: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the validation data in a log: `"eval"`, or `"eval_NAME"` for several."""
    end = "_metric_gain"
    keys = (key for row in history for key in row)
    return list(dict.fromkeys(key.removesuffix(end) for key in keys if key.startswith("eval_") and key.endswith(end)))


def _means(rows: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
    """Mean and standard error of each read-out over some validations. A mean is `None` if a draw is not finite or lacks the value."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{prefix}_") and "/" not in key)
    means: dict[str, float | None] = {}
    errors = {}
    for key in keys:
        name = key.removeprefix(f"{prefix}_")
        values = [row.get(key, math.nan) for row in rows]
        if name in _OF_THE_LOOP or not all(isinstance(value, (int, float)) for value in values):
            continue
        if not all(math.isfinite(value) for value in values):
            means[name] = None
            continue
        means[name] = fmean(values)
        if len(rows) > 1:
            errors[name] = stdev(values) / math.sqrt(len(values))
    return {"step": rows[0]["step"], "draws": len(rows), "mean": means, "standard_error": errors}


def describe_recipe(recipe: TargetTrainingArguments) -> dict[str, Any]:
    """The fields of a recipe that the result depends on. The user's own update rule becomes its name."""
    fields = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in NOT_IN_THE_RESULT}
    return {**fields, "optim": recipe.optim if isinstance(recipe.optim, str) else recipe.optim.__name__}


def training_facts(trainer: Any) -> dict[str, Any]:
    """
    Collects the content of `dpg.json`, which a run's cards are made of: no path, no token, and nothing of the machine's environment.

    Args:
        trainer ([`DatasetPolicyGradientTrainer`]):
            The trainer, before, during or after training.

    Returns:
        `dict[str, Any]`: Content of `dpg.json`, see [`~trl_dpg.publishing.generator_card`].
    """
    from .. import __version__  # imported here since it does not exist yet while the package is being imported

    args, training = trainer.args, trainer.target_training
    recipe = describe_recipe(training.args)
    recipe["steps"] = training.args.num_steps(args.num_target_examples())
    recipe["untie_lm_head"] = args.target_untie_lm_head
    recipe["replay_ratio"], recipe["variants"] = args.replay_ratio, len(args.target_variants or [{}])
    recipe["completion_only_loss"] = training.completion_only_loss
    recipe["assistant_only_loss"] = training.assistant_only_loss
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    generation = {"max_new_tokens": args.max_completion_length, **{name: getattr(args, name) for name in names}}
    generation |= args.generation_kwargs or {}
    state = trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    loaded_step = state.best_global_step if args.load_best_model_at_end else None
    return {
        "base_model": describe_model(model),
        "adapter": isinstance(model, PeftModel),
        "target": {**describe_model(training.target_model), "adapter": isinstance(training.target_model, PeftModel)},
        "metric": description(trainer.metric),
        "reward": args.reward,
        "further_rewards": trainer.reward_func_names[1:],
        "recipe": recipe,
        "generation": {k: v for k, v in generation.items() if v is not None},
        "training": {
            "steps": state.global_step,
            "completions_per_generation_batch": args.generation_batch_size,
            "num_generations": args.num_generations,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
        },
        "datasets": _hub_datasets(trainer.train_dataset),
        "example_prompt": trainer.example_prompt,
        "validation": summarize_validation(state.log_history, loaded_step),
        "versions": {
            "trl-dpg": __version__,
            **{name: version(name) for name in ("trl", "transformers", "torch", "datasets", "tokenizers")},
            "python": platform.python_version(),
        },
    }


def read_facts(generator: str, argument: str, token: str | None = None) -> dict[str, Any] | None:
    """
    Reads the `dpg.json` of a generator, which says what it was trained for, and how its texts were sampled. `None` if it has none.

    Args:
        generator (`str`):
            Directory or id on the Hub. If the directory is a checkpoint without the file, the file of its run is read.
        argument (`str`):
            Name of the caller's argument, for error messages.
        token (`str`, *optional*):
            Token with read permission.

    Raises:
        [`ValueError`]: If there is no such generator.
    """
    if os.path.isdir(generator):
        paths = [Path(generator) / FACTS_FILE, Path(generator).absolute().parent / FACTS_FILE]
        return next((read_json(path) for path in paths if path.exists()), None)
    try:
        return read_json(Path(API.hf_hub_download(generator, FACTS_FILE, token=token)))
    except RemoteEntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"`{argument}` {generator!r} is neither a directory nor a model on {API.endpoint} that this token may see. Push the "
            "generator first (`trainer.push_to_hub()`), or pass its directory."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Errors name the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}). Write or download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} does not hold a JSON object. Write or download it again.")
    return value


def describe_machine(device: torch.device) -> str:
    """Describes the machine of a run in a line: processor, cores and memory, or the GPU; versions of torch and Python; the system."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        cpu = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
        memory = host_memory()[0] / 2**30
        where = f"{cpu}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {memory:.0f} GiB"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"


def _hub_datasets(dataset: Any) -> list[str]:
    """Ids of the Hub's data sets that a data set was loaded from. The paths of its cached files contain them as `NAMESPACE___NAME`."""
    if not isinstance(dataset, Dataset):
        return []
    parts = [part for file in dataset.cache_files for part in Path(file["filename"]).parts if "___" in part]
    return list(dict.fromkeys(part.replace("___", "/") for part in parts))
