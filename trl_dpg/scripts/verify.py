"""
Proves with stock tools what a data set does: fine-tunes the target on it with TRL's `SFTTrainer` and reads the metric.

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
    """Arguments of `trl-dpg verify`, beside those of [`MetricArguments`] and [`~trl.SFTConfig`]."""

    METRICS: ClassVar[tuple[str, ...]] = (*MetricArguments.METRICS, "pattern")  # the picture of a generator

    target: str = option(
        "",
        "The target before fine-tuning: a directory or an id on the Hub. As `generator` says by default, where that is "
        "on the Hub.",
    )
    dataset: str | None = option(
        None,
        "What to fine-tune on: a file or a data set's id, with a column `text`, or else `prompt` and `completion`, or `messages`.",
    )
    dataset_config: str | None = option(None, "Its configuration.")
    dataset_split: str = option("train", "Its split.")
    generator: str | None = option(
        None,
        "Instead of `dataset`: a generator that writes it, from `prompts`. Of its `dpg.json`, the recipe is taken, where "
        "no flag says otherwise, and the metric, if it is a picture (to the pixel) or the norm of the LM head. Another metric "
        "must be given as `metric`.",
    )
    prompts: str | None = option(None, "Prompts for `generator`, with a column `prompt`.")
    prompts_config: str | None = option(None, "Configuration of the prompts.")
    num_examples: int | None = option(
        None,
        "Examples to fine-tune on, from the first. Of `dataset`, all by default; of `generator`, as many as in its training.",
    )
    control_dataset: str | None = option(
        None, "Data to compare with: the target is fine-tuned on as many examples of it, too."
    )
    control_dataset_config: str | None = option(None, "Its configuration.")
    replay_dataset: str | None = option(
        None,
        "Real data that stands beside the data and the control, with its columns. Take texts that no training had.",
    )
    replay_dataset_config: str | None = option(None, "Its configuration.")
    replay_ratio: float = option(0.0, "Share of the real examples, from 0 to below 1. As `generator` says by default.")
    untie_lm_head: bool = option(
        False, "Give the target's LM head a weight of its own. As `generator` says by default."
    )
    json: bool = option(False, "Print JSON.")
    facts: dict[str, Any] = field(default_factory=dict, init=False)  # the content of `dpg.json`

    def __post_init__(self):
        super().__post_init__()
        if not self.target:
            raise ValueError("`target` is missing. Pass the model that the data is to fine-tune with `--target`.")
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
        """The metric. A picture of `dpg.json` is taken as it is there."""
        return LMHeadPattern.from_description(self.facts["metric"]) if self.is_described() else super().load_metric()

    def is_described(self) -> bool:
        """Whether the metric is the picture of `dpg.json`."""
        described = self.facts.get("metric", {})
        if described.get("pattern") is None:
            return False
        return self.metric == "pattern" or (self.metric == "qr" and self.qr_text == described["text"])


# What SFTConfig calls as a recipe does
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
    """What is taken from a generator's `dpg.json` where no flag says otherwise; `metric` is what a flag says."""
    values: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "bf16": False, "num_train_epochs": 1}
    values["dataloader_pin_memory"] = torch.accelerator.is_available()  # else PyTorch warns that it has no effect
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
        values["metric"] = "67" if tuple(described["pattern"]) == SIXTY_SEVEN else "pattern"
    elif metric is None and described.get("name") == "LMHeadNorm":
        values["metric"] = "lm_head_norm"
    return values


def parse(argv: list[str] | None) -> tuple[VerifyArguments, SFTConfig]:
    """Arguments, with what the generator says as their defaults."""
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
            "Leave it out."
        )
    if args.generator is not None and given.metric is None and "metric" not in values:
        name = facts.get("metric", {}).get("name")
        raise ValueError(
            f"`metric` is missing: the {FACTS_FILE!r} of `generator` has {f'the metric {name!r}' if name else 'no metric'}, which "
            "cannot be built from it. Pass `--metric` and what belongs to it."
        )
    if args.metric == "pattern" and not args.is_described():
        raise ValueError(
            f"`metric` 'pattern' is the picture that the {FACTS_FILE!r} of `generator` has, and there is none. Pass another metric."
        )
    return args, config


@dataclass
class GivenFirst:
    """What has to be known before the rest is parsed."""

    generator: str | None = None
    metric: str | None = None


def fine_tune(target: Any, tokenizer: Any, rows: Dataset, config: SFTConfig) -> tuple[Any, float, int]:
    """A copy of the target after `SFTTrainer`, its training loss and its steps."""
    trained = copy.deepcopy(target)
    trainer = SFTTrainer(model=trained, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # which prints to where the results go
    with running(lambda: f"Fine-tuning failed at step {trainer.state.global_step}."):
        output = trainer.train()
    result = copy.deepcopy(target)  # the trainer replaces its model's `forward`
    result.load_state_dict(trained.cpu().state_dict())
    return result, output.training_loss, output.global_step


@torch.no_grad()
def read(metric: Metric, target: Any, model: Any) -> dict[str, float]:
    """Φ and its read-outs of a model that was fine-tuned from the target."""
    target.eval()
    model.eval()
    metric.setup(target)
    return {"metric": float(metric(model)), **metric.readouts(model)}


def main(argv: list[str] | None = None) -> int:
    """
    Runs the command line and returns its exit code: 0 if the data does what it should, 1 if not, 2 on bad input.

    It does if the QR code is read from the two checkpoints; for another picture, if more than 90 % of its pixels are right; for any
    other metric, if Φ is above that of the control, or of the target before fine-tuning where there is no control.
    """
    args, config = parse(argv)
    output_dir = Path(config.output_dir)  # type: ignore[arg-type]
    output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):  # what is printed is the result alone
        result, passed = verify(args, config, output_dir)
    (output_dir / "verification.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        print(table(result))
        verdict = "Verified" if passed else "Not verified, as this does not hold"
        print(f"{verdict}: {result['criterion']}. Written: {output_dir}")
    return 0 if passed else 1


def verify(args: VerifyArguments, config: SFTConfig, output_dir: Path) -> tuple[dict[str, Any], bool]:
    """The verification, and whether it passed."""
    if args.generator is not None:
        args.dataset = str(output_dir / "data.jsonl")
        if args.num_examples is None:  # as many as in training
            known = args.facts.get("training", {}).get("completions_per_generation_batch")
            args.num_examples = known or len(load_rows(str(args.prompts), "train", "prompts", args.prompts_config))
        how: dict[str, Any] = {"num_examples": args.num_examples, "seed": config.seed}
        how["prompts_config"] = args.prompts_config
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
    result["criterion"] = criterion.replace("of the comparison", beside)
    return result, result["passed"]


def load_data(args: VerifyArguments) -> dict[str, Dataset]:
    """Texts of the data, and of the control where there is one: as many of each."""
    rows = {}
    for name in ("data", "control"):
        argument = ARGUMENTS[name]
        path = getattr(args, argument)
        if path is None:
            continue
        rows[name] = data = load_sft_rows(args, argument, args.num_examples)
        if args.num_examples is not None and len(data) < args.num_examples:
            raise ValueError(
                f"`num_examples` is {args.num_examples}, but `{argument}` {path!r} has {len(data)}. Lower it, or add data."
            )
    number = min(map(len, rows.values()))
    if number < max(map(len, rows.values())):
        sizes = " and ".join(f"{len(r)} of the {name}" for name, r in rows.items())
        print(f"There are {sizes}: {number} of each are taken, so that the two compare.")
    return {name: r.take(number) for name, r in rows.items()}


def load_replay(args: VerifyArguments, data: Dataset, seed: int) -> dict[str, Dataset]:
    """Rows that stand beside the data and beside the control, drawn by the seed. Empty where there are none."""
    if args.replay_dataset is None:
        return {}
    rows = load_sft_rows(args, "replay_dataset", None)
    if set(rows.column_names) != set(data.column_names):
        raise ValueError(
            f"`replay_dataset` {args.replay_dataset!r} has the columns {rows.column_names}, but the data {data.column_names}. Give both "
            "the same ones."
        )
    number = num_replayed(len(data), args.replay_ratio)
    return {"replay": rows.select(draw(len(rows), number, seed))}


def load_sft_rows(args: VerifyArguments, argument: str, number: int | None) -> Dataset:
    """Rows with `text`, or else with one of the other sets of columns that `SFTTrainer` takes."""
    path, config = getattr(args, argument), getattr(args, f"{argument}_config")
    rows = load_rows(path, args.dataset_split, argument, config)
    columns = set(rows.column_names)
    if "text" not in columns and ({"prompt", "completion"} <= columns or "messages" in columns):
        return rows.take(min(number or len(rows), len(rows)))
    return load_texts(path, args.dataset_split, argument, number, config=config)


def load_target(args: VerifyArguments) -> tuple[Any, Any]:
    """The target and its tokenizer."""
    with loading(args.target, "target"):
        target: Any = load_target_model(args.target)
    if args.untie_lm_head:
        untie_lm_head(target)
    return target, load_target_tokenizer(args.target)


def check_lengths(
    args: VerifyArguments, rows: dict[str, Dataset], target: Any, tokenizer: Any, config: SFTConfig
) -> None:
    """Refuses rows that cannot be trained on, and texts that are longer than the target's positions."""
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
                f"positions. Set `max_length` to {positions} or less, to cut it off there."
            )


def table(result: dict[str, Any]) -> str:
    """The read-outs side by side."""
    columns = [name for name in ("before", "data", "control") if name in result]
    rows = [["", "before fine-tuning", *(f"after the {name}" for name in columns[1:])]]
    for name in dict.fromkeys(name for column in columns for name in result[column]):
        label = "pixel accuracy (chance: 0.5)" if name == "pixel_accuracy" else heading(name)
        rows.append([label, *(cell(result[column].get(name, "")) for column in columns)])
    return markdown_table(rows)


def cell(value: Any) -> str:
    """A read-out as text; nothing can be decoded from some checkpoints."""
    return "not readable" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
