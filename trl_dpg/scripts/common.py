"""What the scripts share: data, the metric by name, and how a bad argument is said."""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

from ..metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern


FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass
class MetricArguments:
    """
    Which metric the target is wanted to do well on.

    Parameters:
        metric (`str`, *optional*, defaults to `"qr"`):
            `"qr"` or `"67"` (a picture in the LM head), `"lm_head_norm"`, `"likelihood"` of the rows of `metric_dataset`, or
            `"module:attribute"`: a metric of your own, or a class without arguments.
        qr_text (`str`, *optional*, defaults to `"TRL-DPG"`):
            Text of the QR code.
        metric_dataset (`str`, *optional*):
            Data for `"likelihood"`: a file or a data set's id, see [`~trl_dpg.metrics.LanguageModelingLikelihood`].
        metric_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        num_metric_examples (`int`, *optional*, defaults to `8`):
            Its rows that are used, from the first.
    """

    metric: str = field(
        default="qr",
        metadata={
            "help": "'qr' or '67' (a picture in the LM head), 'lm_head_norm', 'likelihood' (of the rows of "
            "`metric_dataset`), or 'module:attribute', a metric or a class without arguments."
        },
    )
    qr_text: str = field(default="TRL-DPG", metadata={"help": "Text of the QR code."})
    metric_dataset: str | None = field(
        default=None, metadata={"help": "Data for 'likelihood': rows with text, or with prompt and completion."}
    )
    metric_dataset_split: str = field(default="train", metadata={"help": "Split of `metric_dataset`."})
    num_metric_examples: int = field(default=8, metadata={"help": "Rows of `metric_dataset` to use, from the first."})

    def __post_init__(self):
        self.metric = str(self.metric)  # YAML reads an unquoted 67 as a number
        if self.metric not in ("qr", "67", "lm_head_norm", "likelihood") and ":" not in self.metric:
            raise ValueError(
                "`metric` must be 'qr', '67', 'lm_head_norm', 'likelihood' or 'module:attribute', got "
                f"{self.metric!r}. Write a metric of your own with a colon, for example 'my_metrics:MyMetric'."
            )
        if self.metric == "likelihood" and self.metric_dataset is None:
            raise ValueError("`metric` 'likelihood' needs data to score. Give it as `metric_dataset`.")
        if self.num_metric_examples < 1:
            raise ValueError(f"`num_metric_examples` must be at least 1, got {self.num_metric_examples}.")

    def load_metric(self) -> Any:
        """The metric. A picture is scaled to the target when it is first looked at."""
        if self.metric == "qr":
            return LMHeadPattern.qr(self.qr_text, scale="auto")
        if self.metric == "67":
            return LMHeadPattern.sixty_seven(scale="auto")
        if self.metric == "lm_head_norm":
            return LMHeadNorm()
        if self.metric == "likelihood":
            rows = load_rows(self.metric_dataset, self.metric_dataset_split, "metric_dataset")  # type: ignore[arg-type]
            return LanguageModelingLikelihood(rows.select(range(min(self.num_metric_examples, len(rows)))))
        module, _, attribute = self.metric.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # a module beside the data
        try:
            metric = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"`metric` {self.metric!r} cannot be imported: {error}.") from error
        return metric() if inspect.isclass(metric) else metric


def load_splits(name: str, argument: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """
    Loads all splits of a data set.

    Args:
        name (`str`):
            File (`.jsonl`, `.json`, `.csv`, `.parquet`, or `.txt` with an example a line), directory or id on the Hub. A
            file has one split, `train`.
        argument (`str`):
            Argument that the name was given as, for error messages.
        config (`str`, *optional*):
            Configuration of the data set.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream it.

    Returns:
        [`~datasets.DatasetDict`], or [`~datasets.IterableDatasetDict`] where it is streamed.

    Raises:
        [`ValueError`]: If there is no such data set.
    """
    builder = FILES.get(os.path.splitext(name)[1])
    try:
        if builder is not None:
            if not os.path.exists(name):
                raise FileNotFoundError(f"there is no file {name!r}")
            return load_dataset(builder, data_files=name, streaming=streaming)
        return load_dataset(name, config, streaming=streaming)
    except (OSError, ValueError, DatasetNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"`{argument}` {name!r} cannot be loaded: {error}") from error


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


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None, prog: str) -> int:
    """
    Runs a script so that bad input ends in one line and exit code 2, rather than in a traceback.

    Args:
        main (`Callable`):
            The script, which takes its arguments and returns its exit code.
        argv (`list[str]`, *optional*):
            Arguments; those of the process if `None`.
        prog (`str`):
            Name to show.

    Returns:
        `int`: Exit code.
    """
    try:
        return main(argv)
    except (ValueError, ImportError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"{prog}: error: {error.filename!r} does not exist.", file=sys.stderr)
        return 2
