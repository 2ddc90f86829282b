"""
Verifies the effect of a data set with stock tools: fine-tunes the target on it with TRL's `SFTTrainer` and measures the metric.

    trl-dpg verify --dataset data.jsonl --target openai-community/gpt2 --metric qr --qr_text TRL-DPG
    trl-dpg verify --generator me/gpt2-qr --target openai-community/gpt2 --prompts prompts.jsonl

Nothing of the training run is used: no reward, no metagradient. Every field of TRL's `SFTConfig` is a flag, too.
"""

import contextlib
import copy
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..data import dataset_examples
from ..metagradients.metric import Metric, as_metric
from ..metrics import LMHeadPattern
from ..metrics.pattern import SIXTY_SEVEN
from ..publishing.facts import FACTS_FILE
from ..publishing.outcome import heading, markdown_table
from ..replay import check_ratio, draw, num_replayed
from ..reporting.plotting import plot_pattern
from ..target import load_target_model, load_target_tokenizer, untie_lm_head
from .common import (
    MetricArguments,
    Parser,
    at_least_one,
    facts_of,
    load_rows,
    load_texts,
    loading,
    option,
    positions_of,
    running,
)
from .generate import GenerateArguments, describe, write


ARGUMENTS = {"data": "dataset", "control": "control_dataset", "replay": "replay_dataset"}


@dataclass
class VerifyArguments(MetricArguments):
    """Arguments of `trl-dpg verify`, added to those of [`MetricArguments`] and [`~trl.SFTConfig`]."""

    METRICS: ClassVar[tuple[str, ...]] = (*MetricArguments.METRICS, "pattern")  # the picture in `dpg.json`

    target: str = option(
        "",
        "The target before fine-tuning: a directory or an id on the Hub. By default, the target of `generator`, if it is "
        "on the Hub.",
    )
    dataset: str | None = option(
        None,
        "Data to fine-tune on: a file or a data set's id, with a column `text`, or else `prompt` and `completion`, or `messages`.",
    )
    dataset_config: str | None = option(None, "Configuration of `dataset`.")
    dataset_split: str = option("train", "Split of `dataset`.")
    generator: str | None = option(
        None,
        "Instead of `dataset`: a generator that writes it, from `prompts`. Its `dpg.json` sets the recipe, unless a flag says "
        "otherwise. It also sets the metric, if this is a picture or the norm of the LM head. Pass any other metric as `metric`.",
    )
    prompts: str | None = option(None, "Prompts for `generator`, with a column `prompt`.")
    prompts_config: str | None = option(None, "Configuration of the prompts.")
    num_examples: int | None = option(
        None,
        "Examples to fine-tune on, from the first. Default: all of `dataset`, or for `generator` as many as in its training.",
    )
    control_dataset: str | None = option(
        None, "Data to compare with. A copy of the target is fine-tuned on as many of its examples."
    )
    control_dataset_config: str | None = option(None, "Configuration of `control_dataset`.")
    replay_dataset: str | None = option(
        None, "Real data to mix into data and control, with the same columns. Use texts that were in no training."
    )
    replay_dataset_config: str | None = option(None, "Configuration of `replay_dataset`.")
    replay_ratio: float = option(
        0.0, "Share of real examples, from 0 to below 1. By default as in `generator`'s training."
    )
    untie_lm_head: bool = option(
        False, "Give the target's LM head a weight of its own. By default as in `generator`'s training."
    )
    json: bool = option(False, "Print JSON.")
    facts: dict[str, Any] = field(default_factory=dict, init=False)  # the content of `dpg.json`

    def __post_init__(self):
        super().__post_init__()
        if not self.target:
            raise ValueError("`target` is missing. Pass the model to fine-tune on the data with `--target`.")
        if (self.dataset is None) == (self.generator is None):
            raise ValueError("Pass one of `dataset` (the data) and `generator` (what writes it), not both or none.")
        if self.generator is not None and self.prompts is None:
            raise ValueError("`generator` needs something to answer. Pass `--prompts`, a file or a data set's id.")
        if self.generator is None and self.prompts is not None:
            raise ValueError("`prompts` are for `generator`, but `dataset` was given. Leave out one of the two.")
        at_least_one(self, "num_examples")
        check_ratio(self.replay_ratio)
        if (self.replay_dataset is None) != (self.replay_ratio == 0):
            raise ValueError(
                f"`replay_dataset` {self.replay_dataset!r} and `replay_ratio` {self.replay_ratio} belong together. Pass both, or neither; "
                "`--replay_ratio 0` where the ratio is that of the generator's training."
            )

    def load_metric(self) -> Any:
        """Makes the metric. A picture is built from `dpg.json`, pixel by pixel."""
        return LMHeadPattern.from_description(self.facts["metric"]) if self.is_described() else super().load_metric()

    def is_described(self) -> bool:
        """Whether the metric is the picture of `dpg.json`."""
        described = self.facts.get("metric", {})
        if described.get("pattern") is None:
            return False
        return self.metric == "pattern" or (self.metric == "qr" and self.qr_text == described["text"])


# Fields that have the same name in SFTConfig as in a recipe
OF_A_RECIPE = ["learning_rate", "lr_scheduler_type", "weight_decay", "warmup_steps", "num_train_epochs"]
OF_A_RECIPE += ["adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_length"]
OF_THE_LOSS = ["completion_only_loss", "assistant_only_loss", "replay_ratio"]  # which older files do not have

GROUPS = {
    "verification": [field.name for field in fields(VerifyArguments) if field.init],
    "recipe (further fields of SFTConfig: `--help-all`)": [
        *(*OF_A_RECIPE, "optim", "per_device_train_batch_size", "completion_only_loss", "assistant_only_loss"),
        *("seed", "use_cpu", "output_dir"),
    ],
}


def defaults(facts: dict[str, Any], metric: str | None) -> dict[str, Any]:
    """Defaults of flags from a generator's `dpg.json`. `metric` is the value of the flag `--metric`, if given."""
    values: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "bf16": False, "num_train_epochs": 1}
    values["dataloader_pin_memory"] = torch.accelerator.is_available()  # otherwise PyTorch warns about it
    recipe, described = facts.get("recipe"), facts.get("metric", {})
    if recipe is not None:
        values |= {name: recipe[name] for name in (*OF_A_RECIPE, "untie_lm_head")}
        values |= {name: recipe[name] for name in OF_THE_LOSS if name in recipe}
        values["optim"] = "sgd" if recipe["optim"] == "sgd" else "adamw_torch"
        batch_size = recipe["batch_size"] or facts["training"]["completions_per_generation_batch"]
        values["per_device_train_batch_size"] = batch_size
        if facts["target"]["on_hub"]:
            values["target"] = facts["target"]["name"]
    if described.get("text") is not None and metric in (None, "qr"):
        values |= {"metric": "qr", "qr_text": described["text"]}
    elif metric is None and described.get("pattern") is not None:
        plain = tuple(described["pattern"]) == SIXTY_SEVEN and described.get("tokens") is None
        values["metric"] = "67" if plain else "pattern"
    elif metric is None and described.get("name") == "LMHeadNorm":
        values["metric"] = "lm_head_norm"
    return values


def parse(argv: list[str] | None) -> tuple[VerifyArguments, SFTConfig]:
    """Parses the arguments. The generator's `dpg.json` sets their defaults."""
    first: Any = GivenFirst
    given, *_ = Parser(first, prog="trl-dpg verify", add_help=False).parse_args_and_config(
        argv, check_rest=lambda *rest: None
    )
    facts = facts_of(given.generator, "generator") if given.generator is not None else {}
    dataclasses: Any = (VerifyArguments, SFTConfig)
    parser = Parser(dataclasses, prog="trl-dpg verify", groups=GROUPS)
    values = defaults(facts, given.metric)
    parser.set_defaults_with_config(output_dir="verification", **values)
    args, config = parser.parse_args_and_config(argv)
    args.facts = facts
    if not config.learning_rate > 0:
        raise ValueError(f"`learning_rate` must be above 0, got {config.learning_rate}.")
    if config.resume_from_checkpoint is not None:
        raise ValueError(
            f"`resume_from_checkpoint` {config.resume_from_checkpoint!r} is not for `verify`, which always starts from `target`. "
            "Leave `resume_from_checkpoint` out."
        )
    if args.generator is not None and given.metric is None and "metric" not in values:
        name = facts.get("metric", {}).get("name")
        raise ValueError(
            f"`metric` is missing: the {FACTS_FILE!r} of `generator` has {f'the metric {name!r}' if name else 'no metric'}, which "
            "cannot be built from this file. Pass `--metric` and its arguments."
        )
    if args.metric == "pattern" and not args.is_described():
        raise ValueError(
            f"`metric` 'pattern' is the picture that the {FACTS_FILE!r} of `generator` has, but there is none. Pass another metric."
        )
    return args, config


@dataclass
class GivenFirst:
    """Arguments that must be known before the others are parsed."""

    generator: str | None = None
    metric: str | None = None


def fine_tune(target: Any, tokenizer: Any, rows: Dataset, config: SFTConfig) -> tuple[Any, float, int]:
    """Fine-tunes a copy of the target with `SFTTrainer`. Returns the copy, its training loss and its number of steps."""
    trained = copy.deepcopy(target)
    trainer = SFTTrainer(model=trained, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # it would print logs among the results
    with running(lambda: f"Fine-tuning failed at step {trainer.state.global_step}."):
        output = trainer.train()
    result = copy.deepcopy(target)  # a new copy, since the trainer replaced the `forward` of `trained`
    result.load_state_dict(trained.cpu().state_dict())
    return result, output.training_loss, output.global_step


@torch.no_grad()
def read(metric: Metric, target: Any, model: Any) -> dict[str, float]:
    """Φ and read-outs of `model`, which was fine-tuned from `target`."""
    target.eval()
    model.eval()
    metric.setup(target)
    return {"metric": float(metric(model)), **metric.readouts(model)}


def main(argv: list[str] | None = None) -> int:
    """
    Runs the command line and returns its exit code: 0 if the data has the wanted effect, 1 if not, 2 on bad input.

    For a QR code, the code must be read from the two checkpoints. For another picture, more than 90 % of the pixels must be right. For
    any other metric, Φ must be above that of the control, or without a control above that of the target before fine-tuning.
    """
    args, config = parse(argv)
    output_dir = Path(config.output_dir)  # type: ignore[arg-type]
    output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):  # standard output gets the result alone
        result, passed = verify(args, config, output_dir)
    (output_dir / "verification.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        print(table(result))
        verdict = "Verified" if passed else "Not verified, because this does not hold"
        print(f"{verdict}: {result['criterion']}. Written: {output_dir}")
    return 0 if passed else 1


def verify(args: VerifyArguments, config: SFTConfig, output_dir: Path) -> tuple[dict[str, Any], bool]:
    """Does the verification. Returns its result, and whether it passed."""
    if args.generator is not None:
        args.dataset = str(output_dir / "data.jsonl")
        if args.num_examples is None:  # the number of completions per step in training
            known = args.facts.get("training", {}).get("completions_per_generation_batch")
            args.num_examples = known or len(load_rows(str(args.prompts), "train", "prompts", args.prompts_config))
        how: dict[str, Any] = {
            "num_examples": args.num_examples,
            "seed": config.seed,
            "prompts_config": args.prompts_config,
        }
        print(describe(write(GenerateArguments(args.generator, str(args.prompts), args.dataset, **how))))
    rows = load_data(args)
    number = len(rows["data"])
    real = load_replay(args, rows["data"], config.seed)
    metric = as_metric(args.load_metric())
    target, tokenizer = load_target(args)
    check_lengths(args, rows | real, target, tokenizer, config)
    result: dict[str, Any] = {"metric": args.metric, "examples": number, "before": read(metric, target, target)}
    if real:
        result["replayed"] = len(real["replay"])
    for name in rows:
        model, loss, steps = fine_tune(target, tokenizer, concatenate_datasets([rows[name], *real.values()]), config)
        readouts = read(metric, target, model)
        model.save_pretrained(output_dir / f"after_{name}")
        tokenizer.save_pretrained(output_dir / f"after_{name}")
        decoded = metric.decode(args.target, output_dir / f"after_{name}")
        result[name] = {**readouts, "loss": loss, "steps": steps, **decoded}
        picture = metric.picture()
        if picture is not None:
            plot_pattern(*picture, output_dir / f"pattern_{name}.png", result[name].get("text"))
    result["learning_rate"], result["seed"] = config.learning_rate, config.seed
    other = "control" if "control" in result else "before"
    result["passed"], criterion = metric.judge(result["data"], result[other])
    beside = "after the control" if other == "control" else "before fine-tuning"
    result["criterion"] = criterion.replace("in the comparison", beside)
    return result, result["passed"]


def load_data(args: VerifyArguments) -> dict[str, Dataset]:
    """Loads the data, and the control if there is one, with the same number of rows."""
    rows = {}
    for name in ("data", "control"):
        argument = ARGUMENTS[name]
        path = getattr(args, argument)
        if path is None:
            continue
        rows[name] = data = load_sft_rows(args, argument, args.num_examples)
        if args.num_examples is not None and len(data) < args.num_examples:
            raise ValueError(
                f"`num_examples` is {args.num_examples}, but `{argument}` {path!r} has {len(data)}. Lower `num_examples`, or add data."
            )
    number = min(map(len, rows.values()))
    if number < max(map(len, rows.values())):
        sizes = " and ".join(f"{len(r)} of the {name}" for name, r in rows.items())
        print(f"There are {sizes}: {number} of each are used, so that the two can be compared.")
    return {name: r.take(number) for name, r in rows.items()}


def load_replay(args: VerifyArguments, data: Dataset, seed: int) -> dict[str, Dataset]:
    """Draws the real rows to mix into data and control, with a seed. Empty if there is no `replay_dataset`."""
    if args.replay_dataset is None:
        return {}
    rows = load_sft_rows(args, "replay_dataset", None)
    if set(rows.column_names) != set(data.column_names):
        raise ValueError(
            f"`replay_dataset` {args.replay_dataset!r} has the columns {rows.column_names}, but the data {data.column_names}. Give both "
            "the same columns."
        )
    number = num_replayed(len(data), args.replay_ratio)
    return {"replay": rows.select(draw(len(rows), number, seed))}


def load_sft_rows(args: VerifyArguments, argument: str, number: int | None) -> Dataset:
    """Loads rows with `text`, or with other columns that `SFTTrainer` takes."""
    path, config = getattr(args, argument), getattr(args, f"{argument}_config")
    rows = load_rows(path, args.dataset_split, argument, config)
    columns = set(rows.column_names)
    if "text" not in columns and ({"prompt", "completion"} <= columns or "messages" in columns):
        return rows.take(min(number or len(rows), len(rows)))
    return load_texts(path, args.dataset_split, argument, number, config=config)


def load_target(args: VerifyArguments) -> tuple[Any, Any]:
    """Loads the target and its tokenizer."""
    with loading(args.target, "target"):
        target: Any = load_target_model(args.target)
    if args.untie_lm_head:
        untie_lm_head(target)
    return target, load_target_tokenizer(args.target)


def check_lengths(
    args: VerifyArguments, rows: dict[str, Dataset], target: Any, tokenizer: Any, config: SFTConfig
) -> None:
    """Raises a [`ValueError`] for rows that cannot be trained on, and for texts with more tokens than the target has positions."""
    positions = positions_of(target)
    for name, data in rows.items():
        what = f"`{ARGUMENTS[name]}` {getattr(args, ARGUMENTS[name])!r}"
        try:
            examples = dataset_examples(data, tokenizer, config.completion_only_loss, config.assistant_only_loss)
        except ValueError as error:
            raise ValueError(f"{what} has rows that the target cannot be trained on: {error}") from error
        longest = max(len(example["input_ids"]) for example in examples)
        longest = min(longest, config.max_length or longest)
        if longest > positions:
            raise ValueError(
                f"{what} has a text of {longest} tokens, but `target` has {positions} "
                f"positions. Set `max_length` to {positions} or less, to cut the text off there."
            )


def table(result: dict[str, Any]) -> str:
    """A Markdown table of the read-outs, side by side."""
    columns = [name for name in ("before", "data", "control") if name in result]
    rows = [["", "before fine-tuning", *(f"after the {name}" for name in columns[1:])]]
    for name in dict.fromkeys(name for column in columns for name in result[column]):
        label = "pixel accuracy (chance: 0.5)" if name == "pixel_accuracy" else heading(name)
        rows.append([label, *(cell(result[column].get(name, "")) for column in columns)])
    return markdown_table(rows)


def cell(value: Any) -> str:
    """A read-out as text. `None` means that nothing could be decoded."""
    return "not readable" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
