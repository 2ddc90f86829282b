"""
Compares metagradients of a model, data, metric and recipe with actual fine-tuning runs.

    trl-dpg check --model openai-community/gpt2 --dataset data.jsonl --metric lm_head_norm --learning_rate 1e-5 --plot check.png
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from ..config import DatasetPolicyGradientConfig
from ..metagradients import TargetTrainingArguments, check_metagradients
from ..reporting.plotting import plot_check
from ..target import load_target_model, load_target_tokenizer
from .common import MetricArguments, Parser, at_least_one, load_texts, loading, make_folder_for, option


# Help texts of recipe fields that differ from those in the trainer's configuration, since there is no generator here
OWN_TEXTS = {
    "batch_size": "Examples per step.",
    "max_length": "Tokens kept of each example.",
    "adam_epsilon_root": "Added inside the square root; `'auto'` measures it on the first gradient.",
    "disable_tqdm": "Whether to show no progress bar.",
}


@dataclass
class CheckArguments(MetricArguments):
    """Arguments of `trl-dpg check`, added to those of [`MetricArguments`] and [`~trl_dpg.metagradients.TargetTrainingArguments`]."""

    metric: str = field(default="lm_head_norm", metadata=MetricArguments.__dataclass_fields__["metric"].metadata)
    model: str = option("", "The target: directory or id of a model or of an adapter, with tokenizer.")
    dataset: str = option("", "Data to fine-tune on: a file or a data set's id.")
    dataset_config: str | None = option(None, "Configuration of `dataset`.")
    dataset_split: str = option("train", "Split of `dataset`.")
    text_column: str = option("text", "Column of `dataset` to train on.")
    num_examples: int = option(64, "Rows of `dataset` to train on, from the first.")
    dtype: str = field(default="float32", metadata={"help": "Precision.", "choices": ["float32", "float64"]})
    num_probes: int = option(4, "Examples whose weight is moved alone.")
    num_reweightings: int = option(8, "Random directions along which all weights are moved.")
    radius: float = option(0.1, "How far weights are moved.")
    check_seed: int = option(0, "Seed of probes and directions.")
    plot: str | None = option(None, "PNG file to write.")
    json: bool = option(False, "Print JSON.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing. Pass it with `--{name}`: a path or an id on the Hub.")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"`dtype` must be 'float32' or 'float64', got {self.dtype!r}.")
        at_least_one(self, "num_examples")


@dataclass(frozen=True)
class RecipeArguments(TargetTrainingArguments):
    """The recipe, with types that the parser knows. It knows no type for a number or `"auto"`, or for a name or a class."""

    optim: str = TargetTrainingArguments.optim  # type: ignore[assignment]
    adam_epsilon_root: str = TargetTrainingArguments.adam_epsilon_root  # type: ignore[assignment]

    def __post_init__(self):
        if self.adam_epsilon_root != "auto":
            try:
                object.__setattr__(self, "adam_epsilon_root", float(self.adam_epsilon_root))
            except ValueError:
                pass  # the base class raises for it
        super().__post_init__()


def recipe_parser(prog: str, *kinds: Any) -> Parser:
    """A parser whose [`RecipeArguments`] have the help texts of the trainer's configuration."""
    parser = Parser(kinds, prog=prog)
    fields = DatasetPolicyGradientConfig.__dataclass_fields__
    for action in parser._actions:
        own = OWN_TEXTS.get(action.dest)
        action.help = action.help or own or fields[f"target_{action.dest}"].metadata["help"]
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 if the check passed, 1 if not, 2 on bad input."""
    args, recipe = recipe_parser("trl-dpg check", CheckArguments, RecipeArguments).parse_args_and_config(argv)
    metric = args.load_metric()
    remedy = "Name one with `--text_column`."
    of_rows = args.num_examples, args.text_column, remedy, args.dataset_config
    rows = load_texts(args.dataset, args.dataset_split, "dataset", *of_rows)
    texts = rows[args.text_column][:]
    make_folder_for(args.plot, "plot")
    accelerator = Accelerator()
    with loading(args.model, "model"):
        tokenizer = load_target_tokenizer(args.model)
        model: Any = load_target_model(args.model, dtype=getattr(torch, args.dtype)).to(accelerator.device)
    examples = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    try:
        probes = args.num_probes, args.num_reweightings, args.radius, args.check_seed
        result = check_metagradients(model, examples, metric, recipe, *probes, accelerator)
    except FloatingPointError as error:  # the recipe fails the check; the input itself is not wrong
        print(f"Metagradients: failed\n- {error}", file=sys.stderr)
        return 1
    if accelerator.is_main_process:
        print(json.dumps(result.to_dict(), indent=2) if args.json else result)
        if args.plot is not None:
            plot_check(result, args.plot)
    return 0 if result.passed else 1
