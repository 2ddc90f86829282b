"""
Checks metagradients of a model, data and recipe from the command line.

    python -m trl_dpg.metagradients.check --model openai-community/gpt2 --dataset data.json --num_examples 64 \
        --metric lm_head_norm --learning_rate 1e-5 --adam_epsilon_root auto --plot check.png

Every field of `TargetTrainingArguments` is a flag. The exit code is 0 if the check passed, 1 if it did not, 2 on bad input.
"""

import inspect
import json
import os
import sys
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ..arguments import TargetTrainingArguments
from . import check_metagradients


# By path: metrics know the engine, which does not know them.
NAMED = {"lm_head_norm": "trl_dpg.metrics:LMHeadNorm", "likelihood": "trl_dpg.metrics:LanguageModelingLikelihood"}


@dataclass
class CheckArguments:
    """What to check."""

    model: str = field(metadata={"help": "Target: a model id or a directory, with its tokenizer."})
    dataset: str = field(metadata={"help": "Training data: a .json or .jsonl file, or a dataset id."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset id."})
    text_column: str = field(default="text", metadata={"help": "Column to train on."})
    num_examples: int = field(default=64, metadata={"help": "Rows to train on, from the first."})
    metric: str = field(
        default="lm_head_norm",
        metadata={
            "help": "'lm_head_norm', 'likelihood' or 'module:attribute', a metric or a class without arguments."
        },
    )
    metric_dataset: str | None = field(
        default=None,
        metadata={"help": "Data of 'likelihood', as `dataset`: rows with text, or prompt and completion."},
    )
    num_metric_examples: int = field(default=8, metadata={"help": "Rows of `metric_dataset` to use."})
    dtype: str = field(default="float32", metadata={"help": "Precision.", "choices": ["float32", "float64"]})
    num_probes: int = field(default=4, metadata={"help": "Examples to move alone."})
    num_reweightings: int = field(default=8, metadata={"help": "Random directions to move all weights along."})
    radius: float = field(default=0.1, metadata={"help": "How far the weights are moved."})
    check_seed: int = field(default=0, metadata={"help": "Seed of the probes and directions."})
    plot: str | None = field(default=None, metadata={"help": "PNG file to write."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


@dataclass
class RecipeArguments(TargetTrainingArguments):
    """The recipe. The parser knows no type that is a number or `"auto"`."""

    adam_epsilon_root: str = str(TargetTrainingArguments.adam_epsilon_root)  # type: ignore[assignment]

    def __post_init__(self):
        if self.adam_epsilon_root != "auto":
            try:
                self.adam_epsilon_root = float(self.adam_epsilon_root)
            except ValueError:
                pass  # said below
        super().__post_init__()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        parser = HfArgumentParser((CheckArguments, RecipeArguments))  # type: ignore[arg-type]
        check, recipe = parser.parse_args_into_dataclasses(argv)
        state = PartialState()
        try:
            tokenizer = AutoTokenizer.from_pretrained(check.model)
            model = AutoModelForCausalLM.from_pretrained(check.model, dtype=getattr(torch, check.dtype))
        except (OSError, ValueError) as error:
            raise ValueError(f"`--model {check.model}` cannot be loaded, or has no tokenizer. {error}") from error
        model.to(state.device)
        rows = _load(check.dataset, check.dataset_split, check.num_examples)
        if check.text_column not in rows.column_names:
            raise ValueError(
                f"`dataset` {check.dataset!r} has the columns {rows.column_names} but no {check.text_column!r}. Name one of "
                "them with `--text_column`."
            )
        examples = [{"input_ids": ids} for ids in tokenizer(list(rows[check.text_column]))["input_ids"]]
        result = check_metagradients(
            model,
            examples,
            _metric(check, tokenizer, recipe.max_length),
            recipe,
            check.num_probes,
            check.num_reweightings,
            check.radius,
            check.check_seed,
            state,
        )
        if state.is_main_process:
            print(json.dumps(result.to_dict(), indent=2) if check.json else result)
            if check.plot is not None:
                result.plot(check.plot)
    except FloatingPointError as error:  # the recipe, rather than the input
        print(f"Metagradients: failed\n- {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if result.passed else 1


def _load(name: str, split: str, number: int) -> Dataset:
    if number < 1:
        raise ValueError(f"The number of examples must be at least 1, got {number}.")
    is_file = name.endswith((".json", ".jsonl"))
    dataset = load_dataset("json", data_files=name, split="train") if is_file else load_dataset(name, split=split)
    return dataset.select(range(min(number, len(dataset))))


def _metric(check: CheckArguments, tokenizer: Any, max_length: int) -> Any:
    module, _, attribute = NAMED.get(check.metric, check.metric).partition(":")
    if not attribute:
        raise ValueError(
            f"`--metric` must be 'lm_head_norm', 'likelihood' or 'module:attribute', got {check.metric!r}. Write the last with a "
            "colon, for example 'my_metrics:MyMetric'."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module beside the data, also where this is not started by `python -m`
    try:
        metric = getattr(import_module(module), attribute)
    except AttributeError as error:
        raise ValueError(f"`--metric {check.metric}`: {error}. Check the name after the colon.") from error
    if check.metric == "likelihood":
        if check.metric_dataset is None:
            raise ValueError("`--metric likelihood` needs data to score. Give it with `--metric_dataset`.")
        rows = _load(check.metric_dataset, check.dataset_split, check.num_metric_examples)
        return metric(rows, tokenizer, max_length=max_length)
    return metric() if inspect.isclass(metric) else metric


if __name__ == "__main__":
    sys.exit(main())
