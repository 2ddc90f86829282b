"""Cards of generators and of the data sets they write, and the facts that they are made of."""

import dataclasses
import json
import math
import os
import platform
import re
import textwrap
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from .metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from .metrics.pattern import SIXTY_SEVEN


PAPER = {
    "title": "Synthetic Data for any Differentiable Target",
    "id": "2604.08423",
    "citation": textwrap.dedent("""\
        @article{thrush2026synthetic,
            title        = {{Synthetic Data for any Differentiable Target}},
            author       = {Tristan Thrush and others},
            year         = 2026,
            eprint       = {arXiv:2604.08423},
        }"""),
}
TAGS = ["trl", "dpg", "dataset-policy-gradients"]
PICTURES = ["pattern.png", "pattern.gif", "curve.png"]

# Read-outs that cards show under another name than their own with spaces.
HEADINGS = {
    "qr_decoded": "QR code read (share of draws)",
    "lm_head_norm": "norm of the LM head",
    "exact_match": "exact recall",
    "longest_common_substring": "longest common substring (share of the text)",
    "held_out_perplexity": "perplexity of other texts",
    "language_share": "share of texts in the language",
    "language_probability": "probability of the language",
    "reference_exact": "generated texts that hold the text itself (share)",
    "reference_soft": "longest common substring of generated texts with the text (share)",
    "metric": "Φ",
    "metric_gain": "Φ, gain over the target before fine-tuning",
    "distinct": "distinct texts (share)",
    "completion_length": "length of the texts (tokens)",
    "target_steps": "optimizer steps of the target",
}
_LAST = ["metric", "metric_gain", "distinct", "completion_length", "target_steps"]
_MAIN = ["pixel_accuracy", "exact_match", "held_out_perplexity"]
_NOT_SHOWN = {"metric_before", "target_loss", "empty", "distinct_share"}
_OF_THE_LOOP = {"runtime", "samples_per_second", "steps_per_second", "num_tokens"}


# ---- Facts: what cards are made of ----


def describe_metric(metric: Any) -> dict[str, Any]:
    """
    Says what a metric wants of the fine-tuned target.

    Args:
        metric (`Callable`):
            Metric, see [`~trl_dpg.metrics`].

    Returns:
        `dict[str, Any]`: `name`, `effect` (what becomes true of a target, as a clause) and `description`; of an
        [`~trl_dpg.metrics.LMHeadPattern`] also `pattern`, rows of `"1"` (dark) and `"-"`, and `text`, that of a QR code.

    Example:

    ```python
    >>> from trl_dpg.metrics import LMHeadNorm

    >>> describe_metric(LMHeadNorm())["effect"]
    'the norm of its LM head becomes smaller'

    ```
    """
    if isinstance(metric, LMHeadPattern):
        rows = ["".join("1" if sign > 0 else "-" for sign in row) for row in metric.pattern.tolist()]
        if metric.text is not None:
            picture = f"a QR code that reads “{metric.text}”"
        elif tuple(rows) == SIXTY_SEVEN:
            picture = "a picture of the digits 67"
        else:
            picture = "a picture"
        return {
            "name": "LMHeadPattern",
            "effect": f"{picture} ({len(rows)} × {len(rows[0])} pixels) appears in its LM head",
            "description": "Log-likelihood of a pattern of signs in the change of the LM head's upper-left patch, row r and "
            "column c of the picture being hidden unit r and token c.",
            "pattern": rows,
            "text": metric.text,
        }
    if isinstance(metric, LMHeadNorm):
        return {
            "name": "LMHeadNorm",
            "effect": "the norm of its LM head becomes smaller",
            "description": "The negative ℓ2 norm of the LM head over all its entries.",
        }
    if isinstance(metric, LanguageModelingLikelihood):
        count = len(metric._examples)
        return {
            "name": "LanguageModelingLikelihood",
            "effect": "a text it was not trained on becomes more likely"
            if count == 1
            else f"{count} texts it was not trained on become more likely",
            "description": f"Mean log-likelihood of {'one text' if count == 1 else f'{count} texts'}, in nats per token.",
        }
    name = getattr(metric, "__name__", type(metric).__name__)
    lines = (metric.__doc__ or "").strip().splitlines() or [f"The metric `{name}`."]
    return {"name": name, "effect": f"its `{name}` rises", "description": lines[0]}


def describe_model(model: Any) -> dict[str, Any]:
    """
    Says which model this is, without its place on this machine.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.

    Returns:
        `dict[str, Any]`: `name` (the id on the Hub, or the last part of a local path), `on_hub`, `architecture` and
        `parameters`, their number, adapters not counted.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name, on_hub = public_name(base.config._name_or_path)
    return {
        "name": name,
        "on_hub": on_hub,
        "architecture": type(base).__name__,
        # `ds_numel` is that of a parameter that DeepSpeed has partitioned
        "parameters": sum(
            p.ds_numel if hasattr(p, "ds_numel") else p.numel() for n, p in base.named_parameters() if "lora_" not in n
        ),
    }


def public_name(name: str) -> tuple[str | None, bool]:
    """
    What of a model's or data set's name may be published.

    Args:
        name (`str`):
            Hub id, or path of a directory or file.

    Returns:
        `tuple[str | None, bool]`: The id and `True`, or the last part of the path (`None` of an empty name) and `False`.

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
    Validation before and after training, as means over draws.

    Args:
        history (`Sequence[dict]`):
            `trainer.state.log_history`.
        best_step (`int`, *optional*):
            Step of the checkpoint that was loaded at the end of training (`load_best_model_at_end`). What was validated at
            the last step before that was another model.

    Returns:
        `dict[str, Any]`: Name of the validation data (`"eval"`, or `"eval_NAME"` for several) → `before` and `after`, each
        with `step`, `draws`, `mean` and `standard_error` (of the mean; empty for one draw) of every read-out. `before` is
        the first step that was validated; it is `None` if that is the last one, too.

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
    suffix = "_metric_gain"
    prefixes = dict.fromkeys(
        key.removesuffix(suffix) for row in history for key in row if key.startswith("eval_") and key.endswith(suffix)
    )
    end_of_training = [index for index, row in enumerate(history) if "train_runtime" in row]
    summary: dict[str, Any] = {}
    for prefix in prefixes:
        indices = [i for i, row in enumerate(history) if f"{prefix}{suffix}" in row]
        rows = [history[i] for i in indices]
        first, last = rows[0]["step"], rows[-1]["step"]
        after = [row for row in rows if row["step"] == last]
        if best_step is not None and end_of_training:
            after = [history[i] for i in indices if i > end_of_training[-1]]
            after = after or [row for row in rows if row["step"] == best_step]
        before = [row for row in rows if row["step"] == first]
        summary[prefix] = {
            "before": _means(before, prefix) if before[0] is not after[0] else None,
            "after": _means(after, prefix),
        }
    return summary


def _means(rows: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
    """Mean and standard error of what is shown of some validations."""
    names = [key.removeprefix(f"{prefix}_") for key in rows[0] if key.startswith(f"{prefix}_")]
    names = [name for name in names if "/" not in name and name not in _OF_THE_LOOP]
    names = [name for name in names if isinstance(rows[0][f"{prefix}_{name}"], (int, float))]
    values = {name: [row[f"{prefix}_{name}"] for row in rows] for name in names}
    errors = {name: stdev(v) / math.sqrt(len(v)) for name, v in values.items()} if len(rows) > 1 else {}
    means = {name: fmean(v) for name, v in values.items()}
    return {"step": rows[0]["step"], "draws": len(rows), "mean": means, "standard_error": errors}


def training_facts(trainer: Any) -> dict[str, Any]:
    """
    What a run's cards are made of: no path, no token, nothing of the machine's environment.

    Args:
        trainer ([`DatasetPolicyGradientTrainer`]):
            Trainer, before, in or after training.

    Returns:
        `dict[str, Any]`: Content of `dpg.json`, see [`generator_card`].
    """
    from . import __version__  # which is not there yet while the package is imported

    args, training = trainer.args, trainer.target_training
    recipe = dataclasses.asdict(training.args)
    for name in ("tape", "tape_dir", "micro_batch_size", "gradient_checkpointing", "disable_tqdm"):
        del recipe[name]  # where and how it was computed, not what
    is_split = args.reward == "naive" or not args.cross_group_batching
    num_examples = args.generation_batch_size // (args.num_generations if is_split else 1)
    recipe["steps"] = training.args.num_steps(num_examples)
    recipe["untie_lm_head"] = args.target_untie_lm_head
    generation = {
        "max_new_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        **(args.generation_kwargs or {}),
    }
    state = trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    loaded_step = state.best_global_step if args.load_best_model_at_end else None
    return {
        "base_model": describe_model(model),
        "adapter": isinstance(model, PeftModel),
        "target": {**describe_model(training.target_model), "adapter": isinstance(training.target_model, PeftModel)},
        "metric": describe_metric(trainer.metric),
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


def _hub_datasets(dataset: Any) -> list[str]:
    """Ids of the Hub's data sets that a data set was loaded from; of their place in the cache, `NAMESPACE___NAME` is left."""
    if not isinstance(dataset, Dataset):
        return []
    parts = [part for file in dataset.cache_files for part in Path(file["filename"]).parts if "___" in part]
    return list(dict.fromkeys(part.replace("___", "/") for part in parts))


# ---- Cards ----


def generator_card(
    facts: dict[str, Any],
    *,
    repo_id: str,
    license: str | None = None,
    datasets: Iterable[str] = (),
    tags: Iterable[str] = (),
    pictures: Iterable[str] = (),
    how_to_get: str | None = None,
) -> ModelCard:
    """
    Makes the card of a generator.

    Args:
        facts (`dict[str, Any]`):
            Content of the generator's `dpg.json`, see [`training_facts`].
        repo_id (`str`):
            Repository, or its name.
        license (`str`, *optional*):
            License, as the Hub abbreviates it. Left open if `None`.
        datasets (`Iterable[str]`, *optional*):
            Ids of data sets that the prompts come from, beside those in `facts`.
        tags (`Iterable[str]`, *optional*):
            Tags beside `trl`, `dpg` and the like.
        pictures (`Iterable[str]`, *optional*):
            Names of those of `pattern.png`, `pattern.gif` and `curve.png` that are in the repository.
        how_to_get (`str`, *optional*):
            How one gets a generator that is not on the Hub, as a sentence.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card; `str(card)` is its text.
    """
    base = facts["base_model"]
    all_datasets = list(dict.fromkeys([*facts["datasets"], *datasets]))
    own_tags = [*TAGS, "synthetic-data-generation", *(["lora"] if facts["adapter"] else [])]
    data = ModelCardData(
        base_model=base["name"] if base["on_hub"] else None,
        datasets=all_datasets or None,
        library_name="peft" if facts["adapter"] else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*own_tags, *tags])),
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(facts, all_datasets) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_template("generator_card.md"),
        facts=facts,
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        license=license,
        datasets=all_datasets,
        pictures=list(pictures),
        how_to_get=how_to_get,
        paper=PAPER,
        **_template_values(facts),
    )


def dataset_card(
    facts: dict[str, Any] | None,
    *,
    repo_id: str,
    generator: str,
    num_examples: int,
    columns: Sequence[str],
    prompts: str | None = None,
    generation: dict[str, Any] | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> DatasetCard:
    """
    Makes the card of a data set that a generator wrote.

    Args:
        facts (`dict[str, Any]` or `None`):
            Content of the generator's `dpg.json`. `None` if it has none; the card then does not say what the data does.
        repo_id (`str`):
            Repository of the data set.
        generator (`str`):
            Id of the generator on the Hub, or its directory, of which the card only shows the name.
        num_examples (`int`):
            Number of examples.
        columns (`Sequence[str]`):
            Columns of the data set.
        prompts (`str`, *optional*):
            Where the prompts come from: a data set's id, or words. Of a path, the card only shows the file's name.
        generation (`dict[str, Any]`, *optional*):
            Generation settings, such as `temperature`.
        license (`str`, *optional*):
            License, as the Hub abbreviates it.
        tags (`Iterable[str]`, *optional*):
            Tags beside `synthetic`, `trl` and `dpg`.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card; `str(card)` is its text.
    """
    generator_name, on_hub = public_name(generator)
    prompts_name, prompts_on_hub = public_name(prompts) if prompts else (None, False)
    prompts_on_hub = prompts_on_hub and prompts_name is not None and "/" in prompts_name and " " not in prompts_name
    bounds = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
    sizes = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M"]
    data = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        size_categories=sizes[sum(num_examples >= bound for bound in bounds)],
        source_datasets=[prompts_name] if prompts_on_hub and prompts_name else None,
        pretty_name=repo_id.split("/")[-1],
        tags=list(dict.fromkeys(["synthetic", *TAGS, *tags])),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    return DatasetCard.from_template(
        data,
        template_str=_template("dataset_card.md"),
        facts=facts,
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        generator=generator_name,
        generator_on_hub=on_hub,
        num_examples=num_examples,
        columns=list(columns),
        prompts=prompts_name,
        prompts_on_hub=prompts_on_hub,
        generation=generation,
        license=license,
        paper=PAPER,
        **(_template_values(facts) if facts is not None else {}),
    )


def _template(name: str) -> str:
    return files("trl_dpg").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _template_values(facts: dict[str, Any]) -> dict[str, Any]:
    tables = {name: _table(draws) for name, draws in facts["validation"].items()}
    prompt = facts["example_prompt"]
    return {
        "tables": tables,
        "headline": _headline(facts),
        "first_table": next(iter(tables.values()), None),
        "metric_before": next((v["after"]["mean"]["metric_before"] for v in facts["validation"].values()), None),
        "recipe": recipe_text(facts["recipe"]),
        "base_text": _model_text(facts["base_model"]),
        "target_text": _model_text(facts["target"]),
        "single_draw": all(draws["after"]["draws"] == 1 for draws in facts["validation"].values()),
        "prompt_row": json.dumps({"prompt": prompt}, ensure_ascii=False),
        "prompt_code": json.dumps(prompt, ensure_ascii=False),
        "call_arguments": _call_arguments(facts["generation"]),
    }


def _model_text(model: dict[str, Any]) -> str:
    """A model as a Markdown phrase: linked, or described."""
    size = model["parameters"]
    unit, letter = (1e9, "B") if size >= 1e9 else (1e6, "M") if size >= 1e6 else (1e3, "k")
    amount = f"{size / unit:.3g}{letter}"
    described = f"{model['architecture']}, {amount} parameters"
    if model["on_hub"]:
        return f"[{model['name']}](https://huggingface.co/{model['name']}) ({described})"
    return (
        f"a local model ({described})" if model["name"] is None else f"`{model['name']}`, a local model ({described})"
    )


def recipe_text(recipe: dict[str, Any]) -> str:
    """The target's fine-tuning run in a line, of the `recipe` in [`training_facts`]."""
    steps = "one step" if recipe["steps"] == 1 else f"{recipe['steps']} steps"
    parts = [
        f"{steps} of {'AdamW' if recipe['optim'] == 'adamw' else 'SGD'}",
        f"{recipe['batch_size']} examples a step",
    ]
    parts.append(f"learning rate {recipe['learning_rate']:g} ({recipe['lr_scheduler_type'].replace('_', ' ')})")
    if recipe["optim"] == "adamw":
        parts.append(f"betas {recipe['adam_beta1']:g} and {recipe['adam_beta2']:g}")
    if recipe["weight_decay"]:
        parts.append(f"weight decay {recipe['weight_decay']:g}")
    if recipe["max_grad_norm"]:
        parts.append(f"gradients clipped to {recipe['max_grad_norm']:g}")
    parts.append(f"texts of up to {recipe['max_length']} tokens")
    if recipe["untie_lm_head"]:
        parts.append("LM head untied from the input embedding")
    return ", ".join(parts)


def _call_arguments(generation: dict[str, Any]) -> str:
    return "".join(f"    {name}={value!r},\n" for name, value in {"do_sample": True, **generation}.items())


def main_readout(facts: dict[str, Any]) -> str:
    """
    The read-out that a run's curve shows and its card begins with: one that says most, or else the metric's first.

    Args:
        facts (`dict[str, Any]`):
            What [`training_facts`] gives.

    Returns:
        `str`: Its name, `"metric_gain"` if nothing was validated yet.
    """
    for validation in facts["validation"].values():
        shown = [name for name in _shown(validation["after"]["mean"]) if name not in _LAST]
        return next((name for name in [*_MAIN, *shown] if name in shown), "metric_gain")
    return "metric_gain"


def _shown(names: Iterable[str]) -> list[str]:
    """Read-outs in the order in which cards show them: those of the metric first."""
    names = [name for name in names if name not in _NOT_SHOWN]
    return [*(name for name in names if name not in _LAST), *(name for name in _LAST if name in names)]


def _headline(facts: dict[str, Any]) -> str | None:
    """What the main read-out came to, as a clause."""
    for validation in facts["validation"].values():
        name, before, after = main_readout(facts), validation["before"], validation["after"]
        text = f"{_heading(name)} {'is' if before is None else 'went from'} "
        if before is not None:
            who = "untrained" if before["step"] == 0 else f"generator at step {before['step']}"
            text += f"{before['mean'][name]:.4g} ({who}) to "
        return f"{text}{after['mean'][name]:.4g}"
    return None


def _heading(name: str) -> str:
    return HEADINGS.get(name, name.replace("_", " "))


def validation_rows(validation: dict[str, Any]) -> list[list[str]]:
    """
    Before and after, as the cells of a table, its head first.

    Args:
        validation (`dict[str, Any]`):
            Of one validation set, what [`summarize_validation`] gives.

    Returns:
        `list[list[str]]`: Rows of cells.
    """
    sides = [side for side in (validation["before"], validation["after"]) if side is not None]
    heads = []
    for side in sides:
        who = "before training" if side["step"] == 0 else f"generator at step {side['step']}"
        if side is validation["after"]:
            who = "this generator"
        heads.append(f"{who}, {side['draws']} draw{'s' if side['draws'] > 1 else ''}")
    rows = [["validation", *heads]]
    for name in _shown(validation["after"]["mean"]):
        cells = []
        for side in sides:
            value, error = side["mean"].get(name), side["standard_error"].get(name)
            text = "" if value is None else f"{value:.4g}"
            cells.append(f"{text} ± {error:.1g}" if error else text)
        rows.append([_heading(name), *cells])
    return rows


def _table(validation: dict[str, Any]) -> str:
    """Before and after, as a Markdown table."""
    head, *rows = (f"| {' | '.join(cells)} |" for cells in validation_rows(validation))
    return "\n".join([head, "|" + "---|" * len(validation_rows(validation)[0]), *rows])


def _eval_results(facts: dict[str, Any], datasets: list[str]) -> list[EvalResult]:
    results = []
    for prefix, validation in facts["validation"].items():
        split = prefix.removeprefix("eval").strip("_")
        for name in _shown(validation["after"]["mean"]):
            if name in ("target_steps", "completion_length"):
                continue
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Writing training data (Dataset Policy Gradients)",
                    dataset_type=datasets[0] if datasets else "held-out-prompts",
                    dataset_name=f"held-out prompts{f' ({split})' if split else ''}",
                    metric_type=name,
                    metric_name=_heading(name),
                    metric_value=float(f"{validation['after']['mean'][name]:.6g}"),
                )
            )
    return results
