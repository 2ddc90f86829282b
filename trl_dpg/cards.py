"""Cards of generators and of the data sets they write."""

import json
import math
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .facts import public_name


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
_LONGEST_PROMPT = 2_000  # characters of each text in the example
_LAST = ["metric", "metric_gain", "distinct", "completion_length", "target_steps"]
_MAIN = ["pixel_accuracy", "exact_match", "held_out_perplexity"]
_SHARES = {"pixel_accuracy", "qr_decoded", "exact_match"}
_NOT_SHOWN = {"metric_before", "target_loss", "empty", "distinct_share"}


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
            Content of the generator's `dpg.json`, see [`~trl_dpg.facts.training_facts`].
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
    values = _template_values(facts)
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
        quoted_id=shlex.quote(repo_id),
        license=license,
        datasets=all_datasets,
        pictures=list(pictures),
        how_to_get=how_to_get,
        paper=PAPER,
        inline=inline,
        **values,
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
        inline=inline,
        **(_template_values(facts) if facts is not None else {}),
    )


def _template(name: str) -> str:
    return files("trl_dpg").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _template_values(facts: dict[str, Any]) -> dict[str, Any]:
    needed = (
        "adapter",
        "base_model",
        "datasets",
        "example_prompt",
        "generation",
        "metric",
        "recipe",
        "target",
        "validation",
    )
    missing = [name for name in needed if name not in facts] or ["metric.readouts"] * (
        "readouts" not in facts["metric"]
    )
    if missing:
        raise ValueError(
            f"The generator's `dpg.json` lacks {', '.join(missing)}, which its card says. Save the generator again with "
            "`trainer.save_model()`, or remove the file for a card without facts."
        )
    tables = {name: _table(draws) for name, draws in facts["validation"].items()}
    prompt = _shortened(facts["example_prompt"])
    return {
        "tables": tables,
        "outcome": outcome(facts),
        "metric_before": next((v["after"]["mean"].get("metric_before") for v in facts["validation"].values()), None),
        "recipe": recipe_text(facts["recipe"]),
        "base_text": _model_text(facts["base_model"]),
        "target_text": _model_text(facts["target"]),
        "single_draw": all(draws["after"]["draws"] == 1 for draws in facts["validation"].values()),
        "prompt_row": json.dumps({"prompt": prompt}, ensure_ascii=False),
        "prompt_code": json.dumps(prompt, ensure_ascii=False) if isinstance(prompt, str) else repr(prompt),
        "call_arguments": _call_arguments(facts["generation"]),
    }


def inline(text: str) -> str:
    """Text that is not ours, for a line or a cell of Markdown: in one line, and without markup but for `code`."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    for sign in "*<[":
        parts[::2] = [part.replace(sign, f"\\{sign}") for part in parts[::2]]
    return "`".join(parts)


def _shortened(prompt: Any) -> Any:
    """A prompt whose long texts are cut."""
    if isinstance(prompt, str) and len(prompt) > _LONGEST_PROMPT:
        return f"{prompt[:_LONGEST_PROMPT]} …"
    if isinstance(prompt, list):
        return [_shortened(part) for part in prompt]
    if isinstance(prompt, dict):
        return {name: _shortened(part) for name, part in prompt.items()}
    return prompt


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
            What [`~trl_dpg.facts.training_facts`] gives.

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


def outcome(facts: dict[str, Any]) -> str:
    """
    Says whether validation found what a generator was trained towards, and what an untrained one comes to.

    A picture is reached if every draw shows all of it. Any other goal is reached if the gain of Φ is above zero and above that
    before training, by more than two standard errors where there are several draws.

    Args:
        facts (`dict[str, Any]`):
            What [`~trl_dpg.facts.training_facts`] gives.

    Returns:
        `str`: One sentence for each validation set.
    """
    sentences = []
    for prefix, validation in facts["validation"].items():
        split = prefix.removeprefix("eval").strip("_")
        where = f"step {validation['after']['step']}{f' on {split}' if split else ''}"
        deciding = facts["metric"]["readouts"]  # of shares, the last is the goal itself
        names = dict.fromkeys([*deciding, main_readout({"validation": {prefix: validation}})])
        figures = "; ".join(_figure(name, validation) for name in names)
        verdict = "reached" if _is_reached(deciding, validation) else "not reached"
        sentences.append(f"In validation at {where}, this was {verdict}: {figures}.")
    return " ".join(sentences) or "Whether this was reached is not known: the generator was not validated."


def _is_reached(deciding: list[str], validation: dict[str, Any]) -> bool:
    before, after = validation["before"], validation["after"]
    name = deciding[-1] if deciding[-1] in _SHARES else "metric_gain"
    value = after["mean"].get(name)
    if value is None:
        return False
    if name in _SHARES:
        return value == 1
    errors = [after["standard_error"].get("metric_gain") or 0.0]
    reached = value > 2 * errors[0]
    if before is not None and (untrained := before["mean"].get("metric_gain")) is not None:
        errors.append(before["standard_error"].get("metric_gain") or 0.0)
        reached = reached and value - untrained > 2 * math.hypot(*errors)
    return reached


def _figure(name: str, validation: dict[str, Any]) -> str:
    """What a read-out came to, and beside it what it is before training and by chance."""
    before, after = validation["before"], validation["after"]
    beside = []
    if before is not None:
        who = "untrained generator" if before["step"] == 0 else f"generator at step {before['step']}"
        beside.append(f"{who}: {_value(name, before['mean'].get(name))}")
    if name == "pixel_accuracy":
        beside.append("chance: 50 %")
    heading = "gain of Φ" if name == "metric_gain" else _heading(name).removesuffix(" (share of draws)")
    return f"{heading} {_value(name, after['mean'].get(name))}" + (f" ({', '.join(beside)})" if beside else "")


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    if name in _SHARES:
        return f"{math.floor(1000 * value + 1e-6) / 10:g} %"  # 2000 of 2001 pixels are 99.9 %
    return f"{value:.4g}"


def _heading(name: str) -> str:
    return HEADINGS.get(name, name.replace("_", " "))


def validation_rows(validation: dict[str, Any]) -> list[list[str]]:
    """
    Before and after, as the cells of a table, its head first.

    Args:
        validation (`dict[str, Any]`):
            Of one validation set, what [`~trl_dpg.facts.summarize_validation`] gives.

    Returns:
        `list[list[str]]`: Rows of cells.
    """
    sides = [side for side in (validation["before"], validation["after"]) if side is not None]
    heads = []
    for side in sides:
        who = "before training" if side["step"] == 0 else f"at step {side['step']}"
        heads.append(f"{who}, {side['draws']} draw{'s' if side['draws'] > 1 else ''}")
    rows = [["validation", *heads]]
    for name in _shown(validation["after"]["mean"]):
        cells = []
        for side in sides:
            value, error = side["mean"].get(name), side["standard_error"].get(name)
            text = "not finite" if value is None else f"{value:.4g}"
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
            value = validation["after"]["mean"][name]
            if name in ("target_steps", "completion_length") or value is None:
                continue
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Writing training data (Dataset Policy Gradients)",
                    dataset_type=datasets[0] if datasets else "held-out-prompts",
                    dataset_name=f"held-out prompts{f' ({split})' if split else ''}",
                    metric_type=name,
                    metric_name=_heading(name),
                    metric_value=float(f"{value:.6g}"),
                )
            )
    return results
