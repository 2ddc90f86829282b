"""Cards of generators and of the data sets they write."""

import json
import os
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from .facts import FACTS_FILE, public_name, training_facts
from .outcome import heading, markdown_table, outcome, recipe_text, shown, split_of, validation_rows


logger = logging.get_logger(__name__)

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

_LONGEST_PROMPT = 2_000  # most characters of each text in the example prompt
# Keys of `dpg.json` that a card needs
_NEEDED = "adapter base_model datasets example_prompt generation metric recipe target validation".split()


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
            Content of the generator's `dpg.json`, see [`~trl_dpg.publishing.training_facts`].
        repo_id (`str`):
            Repository, or its name.
        license (`str`, *optional*):
            License, as the Hub abbreviates it. Left open if `None`.
        datasets (`Iterable[str]`, *optional*):
            Ids of data sets that the prompts come from, in addition to those in `facts`.
        tags (`Iterable[str]`, *optional*):
            Tags, in addition to `trl`, `dpg` and the like.
        pictures (`Iterable[str]`, *optional*):
            Names of the pictures in the repository, from `pattern.png`, `pattern.gif` and `curve.png`.
        how_to_get (`str`, *optional*):
            A sentence that says how to get a generator that is not on the Hub.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card; `str(card)` is its text.
    """
    values = _template_values(facts, repo_id, license)
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
        model_name=values["name"],
        eval_results=_eval_results(facts, all_datasets) or None,
    )
    values |= {"quoted_id": shlex.quote(repo_id), "datasets": all_datasets, "pictures": list(pictures)}
    return ModelCard.from_template(data, template_str=_template("generator_card.md"), how_to_get=how_to_get, **values)


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
            Content of the generator's `dpg.json`. `None` if it has none. The card then does not say what the data does.
        repo_id (`str`):
            Repository of the data set.
        generator (`str`):
            Id of the generator on the Hub, or its directory. Of a directory, the card only shows the last part of the path.
        num_examples (`int`):
            Number of examples.
        columns (`Sequence[str]`):
            Columns of the data set.
        prompts (`str`, *optional*):
            Source of the prompts: a data set's id, or a description. Of a path, the card only shows the file's name.
        generation (`dict[str, Any]`, *optional*):
            Generation settings, such as `temperature`.
        license (`str`, *optional*):
            License, as the Hub abbreviates it.
        tags (`Iterable[str]`, *optional*):
            Tags, in addition to `synthetic`, `trl` and `dpg`.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card; `str(card)` is its text.
    """
    values = _template_values(facts, repo_id, license)
    values["generator"], values["generator_on_hub"] = public_name(generator)
    prompts, is_id = public_name(prompts or "")
    source = prompts if is_id and prompts is not None and "/" in prompts and " " not in prompts else None
    bounds = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
    sizes = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M"]
    data = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        size_categories=sizes[sum(num_examples >= bound for bound in bounds)],
        source_datasets=None if source is None else [source],
        pretty_name=values["name"],
        tags=list(dict.fromkeys(["synthetic", *TAGS, *tags])),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    values |= {"num_examples": num_examples, "columns": list(columns), "generation": generation}
    return DatasetCard.from_template(
        data, template_str=_template("dataset_card.md"), prompts=prompts, prompts_on_hub=source is not None, **values
    )


def write_card(
    trainer: Any,
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Iterable[str] = (),
    license: str | None = None,
) -> None:
    """
    Writes a generator's card, `dpg.json` and pictures into a folder. A failure only logs a warning, so that it does not end a run.

    An existing `README.md` stays as it is, unless it is the card of a generator.
    """
    run, place, readme = Path(trainer.args.output_dir).resolve(), folder.resolve(), folder / "README.md"
    is_inside = run in place.parents  # for example a checkpoint, whose card has the run's name, and no pictures
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = training_facts(trainer)
        replace(folder / FACTS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        earlier = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else None
        if earlier is not None and TAGS[-1] not in earlier:
            logger.warning(
                f"{str(readme)!r} is no card of a generator, so it is left as it is. For a card, remove this file and save again."
            )
            return
        if license is None and earlier is not None:
            license = ModelCard(earlier, ignore_metadata_errors=True).data.get("license")
        own_name = trainer.hub_model_id or trainer.args.hub_model_id or model_name
        card = generator_card(
            facts,
            repo_id=own_name or (run if is_inside else place).name,
            license=license,
            datasets=[dataset_name] if dataset_name is not None and public_name(dataset_name)[1] else [],
            tags=tags,
            pictures=[] if is_inside else _add_pictures(folder, run / "report"),
        )
        replace(readme, str(card))
    except Exception as error:
        logger.warning(
            f"The card of the generator in {str(folder)!r} could not be written: {type(error).__name__}: {error}. The "
            "generator itself is not affected."
        )


def _add_pictures(folder: Path, report: Path) -> list[str]:
    """Copies the pictures of a run's report into the card's folder. Returns the names of all pictures there."""
    pictures = {name: report / name for name in PICTURES}
    pictures["pattern.png"] = [report / "pattern.png", *sorted(report.glob("patterns/step-*.png"))][-1]
    for name, path in pictures.items():
        if path.exists():
            replace(folder / name, path)
    return [name for name in PICTURES if (folder / name).exists()]


def replace(path: Path, content: str | Path) -> None:
    """Replaces a file by a text or by another file, in one step, since an upload may still be reading the old file."""
    aside = path.with_name(f"_{path.name}")
    try:
        if isinstance(content, Path):
            shutil.copyfile(content, aside)
        else:
            aside.write_text(content, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _template(name: str) -> str:
    return files(__package__).joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _template_values(facts: dict[str, Any] | None, repo_id: str, license: str | None) -> dict[str, Any]:
    """Values that both templates need."""
    values: dict[str, Any] = {"facts": facts, "repo_id": repo_id, "name": repo_id.split("/")[-1], "license": license}
    values |= {"paper": PAPER, "inline": inline}
    if facts is None:
        return values
    missing = [name for name in _NEEDED if name not in facts]
    if not missing and "readouts" not in facts["metric"]:
        missing = ["metric.readouts"]
    if missing:
        raise ValueError(
            f"The generator's `dpg.json` lacks {', '.join(missing)}, which its card needs. Save the generator again with "
            "`trainer.save_model()`, or remove the file for a card without facts."
        )
    sets, prompt = facts["validation"].values(), _shortened(facts["example_prompt"])
    sampling = {"do_sample": True, **facts["generation"]}
    return values | {
        "tables": {name: markdown_table(validation_rows(rows)) for name, rows in facts["validation"].items()},
        "outcome": outcome(facts),
        "metric_before": next((validation["after"]["mean"].get("metric_before") for validation in sets), None),
        "recipe": recipe_text(facts["recipe"]),
        "base_text": _model_text(facts["base_model"]),
        "target_text": _model_text(facts["target"]),
        "single_draw": all(validation["after"]["draws"] == 1 for validation in sets),
        "prompt_row": json.dumps({"prompt": prompt}, ensure_ascii=False),
        "prompt_code": json.dumps(prompt, ensure_ascii=False) if isinstance(prompt, str) else repr(prompt),
        "call_arguments": "".join(f"    {name}={value!r},\n" for name, value in sampling.items()),
    }


def inline(text: str) -> str:
    """Prepares a user's text for a line or table cell of Markdown: puts it into one line, and escapes all markup but `code`."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    for sign in "*<[":
        parts[::2] = [part.replace(sign, f"\\{sign}") for part in parts[::2]]
    return "`".join(parts)


def _shortened(prompt: Any) -> Any:
    """A prompt with its long texts cut."""
    if isinstance(prompt, str) and len(prompt) > _LONGEST_PROMPT:
        return f"{prompt[:_LONGEST_PROMPT]} …"
    if isinstance(prompt, list):
        return [_shortened(part) for part in prompt]
    if isinstance(prompt, dict):
        return {name: _shortened(part) for name, part in prompt.items()}
    return prompt


def _model_text(model: dict[str, Any]) -> str:
    """A model as a Markdown phrase, with a link if the model is on the Hub."""
    size, name = model["parameters"], model["name"]
    unit, letter = (1e9, "B") if size >= 1e9 else (1e6, "M") if size >= 1e6 else (1e3, "k")
    described = f"{model['architecture']}, {size / unit:.3g}{letter} parameters"
    if model["on_hub"]:
        return f"[{name}](https://huggingface.co/{name}) ({described})"
    return f"a local model ({described})" if name is None else f"the local model `{name}` ({described})"


def _eval_results(facts: dict[str, Any], datasets: list[str]) -> list[EvalResult]:
    results = []
    for prefix, validation in facts["validation"].items():
        split, means = split_of(prefix), validation["after"]["mean"]
        for name in shown(means):
            if name not in ("target_steps", "completion_length") and means[name] is not None:
                result = EvalResult(
                    task_type="text-generation",
                    task_name="Writing training data (Dataset Policy Gradients)",
                    dataset_type=datasets[0] if datasets else "held-out-prompts",
                    dataset_name=f"held-out prompts{f' ({split})' if split else ''}",
                    metric_type=name,
                    metric_name=heading(name),
                    metric_value=float(f"{means[name]:.6g}"),
                )
                results.append(result)
    return results
