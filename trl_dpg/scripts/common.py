"""What the scripts share: arguments, data, the metric by name, and how a bad argument is said."""

import argparse
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import yaml
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from trl import TrlParser

from ..metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from ..publishing import read_facts


FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Parser(TrlParser):
    """TRL's parser. What is wrong is one `ValueError`, negative numbers are values, and YAML is read as strictly as flags are."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # Python's own takes -1e-3 for the name of a flag

    def error(self, message: str):
        """Raises, where argparse prints all flags."""
        raise ValueError(f"{message}. `{self.prog} --help` lists the flags and their values.")

    def parse_args_and_config(self, args: Iterable[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        """As of [`~trl.TrlParser`], and takes `--config=FILE`, too."""
        flags: list[str] = []
        for flag in sys.argv[1:] if args is None else args:
            flags += flag.split("=", 1) if flag.startswith("--config=") else [flag]
        positions = [index for index, flag in enumerate(flags) if flag == "--config"]
        if len(positions) > 1:
            raise ValueError("`--config` was given twice. Put all settings into one file.")
        if positions and positions[0] + 1 == len(flags):
            raise ValueError("`--config` has no value. Give it the path of a YAML file.")
        try:
            return super().parse_args_and_config(flags, *rest, **kwargs)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`--config` {flags[positions[0] + 1]!r} is no YAML: {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.doc!r} was given as JSON, but is none: {error}. Correct the value.") from error

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """As of [`~trl.TrlParser`], but converts and checks each value as if it were on the command line."""
        for action in self._actions:
            value = kwargs.get(action.dest)
            values = value if isinstance(value, list) else [value]
            if action.type is None or not all(isinstance(item, (str, int, float)) for item in values):
                continue  # no value, or one that no flag can have
            try:
                values = [self._get_value(action, str(item)) for item in values]
                for item in values:
                    self._check_value(action, item)
            except argparse.ArgumentError as error:
                quotes = " (YAML reads yes, no, on and off as true and false: put them in quotes)"
                self.error(f"{error}{quotes if isinstance(value, bool) else ''}")
            kwargs[action.dest] = values if isinstance(value, list) or action.nargs == "+" else values[0]
        return super().set_defaults_with_config(**kwargs)


def option(default: Any, help: str) -> Any:
    """A field of arguments, with its help."""
    return field(default=default, metadata={"help": help})


@dataclass
class MetricArguments:
    """Which metric the target is wanted to do well on."""

    METRICS: ClassVar[tuple[str, ...]] = ("qr", "67", "lm_head_norm", "likelihood")

    metric: str = option(
        "qr",
        "'qr' or '67' (a picture in the LM head), 'lm_head_norm', 'likelihood' (of the rows of "
        "`metric_dataset`), or 'module:attribute': a metric of your own, or a class without arguments.",
    )
    qr_text: str = option("TRL-DPG", "Text of the QR code.")
    metric_dataset: str | None = option(
        None, "Data for 'likelihood', a file or a data set's id: rows with text, or prompt and completion."
    )
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
        of_likelihood = ("metric_dataset", "metric_dataset_split", "num_metric_examples")
        for name, metric in {"qr_text": "qr", **dict.fromkeys(of_likelihood, "likelihood")}.items():
            if self.metric != metric and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}` {getattr(self, name)!r} is for `metric` {metric!r}, but `metric` is {self.metric!r}. Leave out one "
                    "of the two."
                )
        if not self.qr_text:
            raise ValueError("`qr_text` is empty, and a QR code of nothing cannot be read. Give it a text.")
        try:
            LMHeadPattern.qr(self.qr_text)
        except ValueError as error:
            raise ValueError(
                f"`qr_text` {self.qr_text!r:.40} fits in no QR code: {error}. Give a shorter one."
            ) from error
        at_least_one(self, "num_metric_examples")

    def load_metric(self) -> Any:
        """The metric. A picture is scaled to the target when it is first looked at."""
        if self.metric == "qr":
            return LMHeadPattern.qr(self.qr_text)
        if self.metric == "67":
            return LMHeadPattern.sixty_seven()
        if self.metric == "lm_head_norm":
            return LMHeadNorm()
        if self.metric == "likelihood":
            rows = load_rows(self.metric_dataset, self.metric_dataset_split, "metric_dataset")  # type: ignore[arg-type]
            return LanguageModelingLikelihood(rows.select(range(min(self.num_metric_examples, len(rows)))))
        return load_callable(self.metric, ":", "metric")


def load_callable(name: str, separator: str, argument: str) -> Any:
    """What a path such as `module:attribute` names, looked up in the current directory, too. Of a class, an instance is made."""
    module, _, attribute = name.rpartition(separator)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
        found = found() if inspect.isclass(found) else found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"`{argument}` {name!r} cannot be imported, or made without arguments: {error}. Correct its name."
        ) from error
    if not callable(found):
        raise ValueError(f"`{argument}` {name!r} is {found!r}, which cannot be called. Name a function.")
    return found


def load_splits(name: str, argument: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """
    All splits of a data set: a file (with one split, `train`), a directory (that of `save_to_disk`, too) or an id on the Hub.

    Raises:
        [`ValueError`]: If there is no such data set. It names `argument`, that `name` was given as.
    """
    builder = FILES.get(os.path.splitext(name)[1])
    try:
        if builder is not None:
            if not os.path.exists(name):
                raise FileNotFoundError(f"there is no file {name!r}")
            if config is not None:
                raise ValueError(f"a file has no configurations, but `dataset_config` is {config!r}. Leave it out")
            return load_dataset(builder, data_files=name, streaming=streaming)
        if os.path.isdir(name) and {"state.json", "dataset_dict.json"} & set(os.listdir(name)):  # by `save_to_disk`
            saved = load_from_disk(name)
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return load_dataset(name, config, streaming=streaming)
    except (OSError, ValueError, StopIteration, DatasetsError, HfHubHTTPError) as error:
        reason = error.__cause__ or str(error) or "it is empty"  # the cause is the row or the format that is wrong
        raise ValueError(f"`{argument}` {name!r} cannot be loaded: {reason}") from error


def load_rows(name: str, split: str, argument: str) -> Dataset:
    """One split of what [`load_splits`] loads."""
    splits = load_splits(name, argument)
    return take_split(splits, split, name, argument)


def take_split(splits: DatasetDict, split: str, name: str, argument: str) -> Any:
    """A split, or an error that says which there are."""
    if split not in splits:
        raise ValueError(f"`{argument}` {name!r} has the splits {list(splits)} but no {split!r}.")
    rows = splits[split]
    if not isinstance(rows, IterableDataset) and len(rows) == 0:
        raise ValueError(f"`{argument}` {name!r} has no rows in its split {split!r}.")
    return rows


def check_column(rows: Dataset, column: str, name: str, argument: str, remedy: str = "Rename one.") -> None:
    """Refuses data without a column."""
    if column not in rows.column_names:
        raise ValueError(f"`{argument}` {name!r} has the columns {rows.column_names} but no {column!r}. {remedy}")


def load_texts(
    name: str, split: str, argument: str, number: int | None = None, column: str = "text", remedy: str = "Rename one."
) -> Dataset:
    """One column of data to fine-tune on, of all rows or of the first, or an error that says which of them is no text."""
    rows = load_rows(name, split, argument)
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
    """Names the argument where its model or tokenizer cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {name!r} cannot be loaded: {error}") from error


def positions_of(model: Any) -> float:
    """How many tokens a model has positions for; some have no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def at_least_one(args: Any, *names: str) -> None:
    """Refuses numbers below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def make_folder_for(path: str | None, argument: str) -> None:
    """Makes the folder of a file that is written in the end, or says in time why there can be none."""
    try:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`{argument}` {path!r} cannot be written: {error}. Name another place.") from error


def facts_of(generator: str, argument: str) -> dict[str, Any]:
    """The `dpg.json` of a generator, empty if there is none, or none in the cache where the Hub cannot be asked."""
    try:
        return read_facts(generator, argument) or {}
    except LocalEntryNotFoundError:
        return {}
    except HfHubHTTPError as error:
        raise ValueError(f"`{argument}` {generator!r} cannot be read from the Hub: {error}") from error


def checkpoint_to_resume(value: str | bool | None) -> str | bool | None:
    """What `resume_from_checkpoint` means: the last checkpoint (`True`), none (`None`), or the folder of one."""
    words = {"true": True, "yes": True, "1": True, "false": None, "no": None, "0": None, "none": None}
    checkpoint = words.get(str(value).lower(), value)
    if isinstance(checkpoint, str) and not os.path.isdir(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` {checkpoint!r} is no folder. Name a checkpoint, or say `True` for the last one in "
            "`output_dir`."
        )
    return checkpoint


@contextmanager
def running(note: Callable[[], str]) -> Iterator[None]:
    """Where a script does its work. What fails there keeps its traceback, with this note below: what there is, how to go on."""
    try:
        yield
    except Exception as error:
        error.add_note(note())
        raise


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None, prog: str) -> int:
    """
    Runs a script and returns its exit code: 2, and one line of error, on bad input.

    Other errors, and those with a note, keep their traceback. `argv` are those of the process if `None`.
    """
    try:
        return main(argv)
    except (ValueError, ImportError, OSError) as error:
        if hasattr(error, "__notes__"):  # by `running`
            raise
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            error = ValueError(f"{str(error.filename)!r} does not exist.")
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
