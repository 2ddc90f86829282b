"""Helpers of the scripts: they load metrics by name, data and models."""

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from ..publishing import read_facts
from .parsing import Parser, at_least_one, make_folder_for, option, run_script  # noqa: F401 (scripts take them from here)


FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass
class MetricArguments:
    """Arguments that choose the metric."""

    METRICS: ClassVar[tuple[str, ...]] = ("qr", "67", "lm_head_norm", "likelihood")

    metric: str = option(
        "qr",
        "'qr' or '67' (a picture in the LM head), 'lm_head_norm', 'likelihood' (of the rows of "
        "`metric_dataset`), or 'module:attribute': your own metric, or a class without arguments.",
    )
    qr_text: str = option("TRL-DPG", "Text of the QR code.")
    metric_dataset: str | None = option(
        None, "Data for 'likelihood', a file or a data set's id: rows with text, or prompt and completion."
    )
    metric_dataset_config: str | None = option(None, "Configuration of `metric_dataset`.")
    metric_dataset_split: str = option("train", "Split of `metric_dataset`.")
    num_metric_examples: int = option(8, "Rows of `metric_dataset` to use, from the first.")

    def __post_init__(self):
        self.metric = str(self.metric)  # YAML reads an unquoted 67 as a number
        if self.metric not in self.METRICS and ":" not in self.metric:
            raise ValueError(
                f"`metric` must be {', '.join(map(repr, self.METRICS))} or 'module:attribute', got {self.metric!r}. Write a metric of your own with a colon, for example 'my_metrics:MyMetric'."
            )
        if self.metric == "likelihood" and self.metric_dataset is None:
            raise ValueError("`metric` 'likelihood' needs data to score. Give it as `metric_dataset`.")
        of_likelihood = ("metric_dataset", "metric_dataset_config", "metric_dataset_split", "num_metric_examples")
        for name, metric in {"qr_text": "qr", **dict.fromkeys(of_likelihood, "likelihood")}.items():
            if self.metric != metric and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}` {getattr(self, name)!r} is for `metric` {metric!r}, but `metric` is {self.metric!r}. Leave one of "
                    "the two out."
                )
        if not self.qr_text:
            raise ValueError("`qr_text` is empty, but a QR code needs a text. Give it one.")
        try:
            LMHeadPattern.qr(self.qr_text)
        except ValueError as error:
            raise ValueError(
                f"`qr_text` {self.qr_text!r:.40} fits in no QR code: {error}. Give a shorter text."
            ) from error
        at_least_one(self, "num_metric_examples")

    def load_metric(self) -> Any:
        """Makes the metric. The scale of a picture is measured in the first fine-tuning run."""
        if self.metric == "qr":
            return LMHeadPattern.qr(self.qr_text)
        if self.metric == "67":
            return LMHeadPattern.sixty_seven()
        if self.metric == "lm_head_norm":
            return LMHeadNorm()
        if self.metric == "likelihood":
            name, config = str(self.metric_dataset), self.metric_dataset_config
            rows = load_rows(name, self.metric_dataset_split, "metric_dataset", config)
            return LanguageModelingLikelihood(rows.select(range(min(self.num_metric_examples, len(rows)))))
        return load_callable(self.metric, ":", "metric")


def load_callable(name: str, separator: str, argument: str) -> Any:
    """Imports the function that `module:attribute` names, also from the current directory. Of a class, makes an instance."""
    module, _, attribute = name.rpartition(separator)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
        found = found() if inspect.isclass(found) else found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"`{argument}` {name!r} cannot be imported, or made without arguments: {error}. Correct the name."
        ) from error
    if not callable(found):
        raise ValueError(f"`{argument}` {name!r} is {found!r}, which cannot be called. Name a function.")
    return found


def load_splits(name: str, argument: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """
    Loads all splits of a data set: a file (with one split, `train`), a directory (even one of `save_to_disk`) or an id on the Hub.

    Raises:
        [`ValueError`]: If there is no such data set. `argument` is the name of the caller's argument, for messages.
    """
    builder = FILES.get(os.path.splitext(name)[1])
    is_saved = os.path.isdir(name) and {"state.json", "dataset_dict.json"} & set(os.listdir(name))  # by `save_to_disk`
    try:
        if builder is not None:
            if not os.path.exists(name):
                raise FileNotFoundError(f"there is no file {name!r}")
        if config is not None and (builder is not None or is_saved):
            flag = argument.removesuffix("_name").replace("metric_texts", "metric_dataset") + "_config"
            raise ValueError(f"a file has no configurations, but `{flag}` is {config!r}. Leave it out")
        if builder is not None:
            return load_dataset(builder, data_files=name, streaming=streaming)
        if is_saved:
            saved = load_from_disk(name)
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return load_dataset(name, config, streaming=streaming)
    except (OSError, ValueError, StopIteration, DatasetsError, HfHubHTTPError) as error:
        reason = error.__cause__ or str(error) or "it is empty"  # the cause names the wrong row or format
        raise ValueError(f"`{argument}` {name!r} cannot be loaded: {reason}") from error


def load_rows(name: str, split: str, argument: str, config: str | None = None) -> Dataset:
    """Loads one split of a data set, see [`load_splits`]."""
    splits = load_splits(name, argument, config)
    return take_split(splits, split, name, argument)


def take_split(splits: DatasetDict, split: str, name: str, argument: str) -> Any:
    """Returns a split. If it is missing, the error lists the splits."""
    if split not in splits:
        raise ValueError(f"`{argument}` {name!r} has the splits {list(splits)} but no {split!r}.")
    rows = splits[split]
    if not isinstance(rows, IterableDataset) and len(rows) == 0:
        raise ValueError(f"`{argument}` {name!r} has no rows in its split {split!r}.")
    return rows


def check_column(rows: Dataset, column: str, name: str, argument: str, remedy: str = "Rename one.") -> None:
    """Raises a [`ValueError`] if data lacks a column."""
    if column not in rows.column_names:
        raise ValueError(f"`{argument}` {name!r} has the columns {rows.column_names} but no {column!r}. {remedy}")


def load_texts(
    name: str,
    split: str,
    argument: str,
    number: int | None = None,
    column: str = "text",
    remedy: str = "Rename one.",
    config: str | None = None,
) -> Dataset:
    """Loads one column of texts, of all rows or of the first `number`. If a row is no text, the error names the row."""
    rows = load_rows(name, split, argument, config)
    check_column(rows, column, name, argument, remedy)
    rows = rows.select_columns(column).take(min(number or len(rows), len(rows)))
    for index, text in enumerate(rows[column]):
        if not isinstance(text, str):
            raise ValueError(
                f"`{argument}` {name!r} has {text!r} as the {column!r} of row {index}. Make it a text, or leave the row out."
            )
    return rows


@contextmanager
def loading(name: str, argument: str) -> Iterator[None]:
    """Makes errors name the argument whose model or tokenizer cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {name!r} cannot be loaded: {error}") from error


def positions_of(model: Any) -> float:
    """Number of tokens that a model has positions for. Some models have no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def facts_of(generator: str, argument: str) -> dict[str, Any]:
    """The `dpg.json` of a generator. Empty if there is none, or if the Hub cannot be asked and the cache has none."""
    try:
        return read_facts(generator, argument) or {}
    except LocalEntryNotFoundError:
        return {}
    except HfHubHTTPError as error:
        raise ValueError(f"`{argument}` {generator!r} cannot be read from the Hub: {error}") from error


def checkpoint_to_resume(value: str | bool | None) -> str | bool | None:
    """Interprets `resume_from_checkpoint`: the last checkpoint (`True`), none (`None`), or the folder of one."""
    words = {"true": True, "yes": True, "1": True, "false": None, "no": None, "0": None, "none": None}
    checkpoint = words.get(str(value).lower(), value)
    if isinstance(checkpoint, str) and not os.path.isdir(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` {checkpoint!r} is no folder. Name a checkpoint, or pass `True` for the last one in "
            "`output_dir`."
        )
    return checkpoint


@contextmanager
def running(note: Callable[[], str]) -> Iterator[None]:
    """Adds a note to errors of a script's main work. With a note, [`run_script`] keeps their traceback. The note says how to go on."""
    try:
        yield
    except Exception as error:
        error.add_note(note())
        raise
