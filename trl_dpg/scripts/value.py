"""
Ranks the rows of a data set by metagradient: the effect of each row on a metric of the model that is fine-tuned on all rows.

    trl-dpg value --dataset data.jsonl --model openai-community/gpt2 --metric_texts held_out.jsonl --output valuation
    accelerate launch --num_processes 8 -m trl_dpg.scripts.value --config value.yaml

Every field of [`ValueArguments`], [`~trl_dpg.metagradients.TargetTrainingArguments`] and TRL's `ModelConfig` is a flag.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..data import dataset_examples
from ..metagradients import MetagradientOutput, TargetTrainingArguments, compute_metagradients
from ..metagradients.metric import as_metric, description
from ..metagradients.runtime.model import TargetModel
from ..metrics import LanguageModelingLikelihood
from ..publishing.facts import describe_machine, describe_model, describe_recipe, public_name
from ..reporting.valuation import Valuation, find_flags, middle_draws, token_credits, write_valuation_page
from ..sft_rows import is_chat
from ..target import load_target_model, load_target_tokenizer
from .check import RecipeArguments, recipe_parser
from .common import MetricArguments, at_least_one, load_rows, loading, make_folder_for, option, run_script


# Columns of each kind of rows. As in `SFTTrainer`, the first kind whose columns exist counts.
KINDS = (("prompt", "completion"), ("messages",), ("text",))
FILES = ("scores.parquet", "scores.jsonl", "valuation.json", "index.html")


@dataclass
class ValueArguments(MetricArguments):
    """Arguments of `trl-dpg value`, added to those of [`MetricArguments`], the recipe and [`~trl.ModelConfig`]."""

    metric: str = field(default="likelihood", metadata=MetricArguments.__dataclass_fields__["metric"].metadata)
    metric_texts: str | None = option(None, "Held-out rows, as `NAME[:split]`. Their likelihood is the metric.")
    num_metric_examples: int | None = option(  # type: ignore[assignment]
        None, "Rows of `metric_texts` to use, from the first. All by default."
    )
    dataset: str = option(
        "", "Rows to rank, `NAME[:split]`: a file, a folder or a data set's id. The default split is `train`."
    )
    dataset_config: str | None = option(None, "Configuration of `dataset`.")
    model: str = option("", "The model to fine-tune: a directory or an id on the Hub, with tokenizer.")
    output: str = option("", "Folder to write.")
    num_examples: int | None = option(None, "Rows of `dataset` to rank, from the first. All by default.")
    num_draws: int = option(
        1, "Number of orders of the rows to take the median over. Their seeds count up from `seed`."
    )
    completion_only_loss: bool | None = option(None, "As in `SFTConfig`: whether prompts have no loss. Default: yes.")
    assistant_only_loss: bool = option(False, "As in `SFTConfig`: only the assistant's messages have a loss.")
    tokens: bool = option(False, "Write the score of each token, too.")
    overwrite: bool = option(False, "Replace an earlier valuation in `output`.")
    json: bool = option(False, "Print JSON.")

    def __post_init__(self):
        if self.metric_texts is not None:
            if self.metric != "likelihood" or self.metric_dataset is not None:
                raise ValueError(
                    f"`metric_texts` {self.metric_texts!r} is the `metric_dataset` of `metric` 'likelihood', but `metric` is "
                    f"{self.metric!r} and `metric_dataset` {self.metric_dataset!r}. Leave out one of the two."
                )
            self.metric_dataset, self.metric_dataset_split = name_and_split(self.metric_texts)
        elif self.metric == "likelihood" and self.metric_dataset is None:
            raise ValueError(
                "`metric_texts` is missing. Pass held-out texts that the fine-tuned model should find likely, or another `metric`."
            )
        super().__post_init__()
        for name in ("dataset", "output"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing. Pass it with `--{name}`.")
        at_least_one(self, "num_examples", "num_draws")


def name_and_split(name: str) -> tuple[str, str]:
    """Name and split from `NAME[:split]`."""
    before, colon, split = name.rpartition(":")
    if not colon or not split.isidentifier() or os.path.exists(name):
        return name, "train"
    return before, split


def parse(argv: list[str] | None) -> tuple[ValueArguments, RecipeArguments, ModelConfig]:
    """Parses the arguments, and checks them as far as possible before anything is loaded."""
    parser = recipe_parser("trl-dpg value", ValueArguments, RecipeArguments, ModelConfig)
    args, recipe, model_args = parser.parse_args_and_config(argv)
    args.model = args.model or model_args.model_name_or_path
    if not args.model:
        raise ValueError("`model` is missing. Pass it with `--model`: a path or an id on the Hub.")
    default = ModelConfig()
    of_lora = [name for name in vars(default) if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    unused = [name for name in of_lora if getattr(model_args, name) != getattr(default, name)]
    if unused and not model_args.use_peft:
        raise ValueError(
            f"`{unused[0]}` {getattr(model_args, unused[0])!r} is for an adapter, but `use_peft` is False. Add `--use_peft`, or leave the flag out."
        )
    if args.num_draws > 1 and not recipe.shuffle:
        raise ValueError(
            f"`num_draws` {args.num_draws} asks for that many orders of the rows, but `shuffle` is False. Leave out one of the two."
        )
    return args, recipe, model_args


def value_examples(
    model: TargetModel,
    examples: Sequence[dict[str, Any]],
    metric: Callable[[Any], Tensor],
    recipe: TargetTrainingArguments,
    num_draws: int = 1,
    accelerator: Accelerator | PartialState | None = None,
) -> Valuation:
    """
    Computes metagradients of examples for several orders (draws). Each draw costs one call of
    [`~trl_dpg.metagradients.compute_metagradients`].

    `num_draws` is the number of orders. All other arguments, and the errors, are those of this function.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from trl_dpg.metagradients import TargetTrainingArguments
    >>> from trl_dpg.scripts.value import value_examples

    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    >>> examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}, {"input_ids": [7, 6]}]
    >>> recipe = TargetTrainingArguments(batch_size=1, learning_rate=1e-3)
    >>> valuation = value_examples(model, examples, lambda model: -model.lm_head.weight.norm(), recipe, num_draws=2)
    >>> valuation.scores.shape, sorted(valuation.ranking)
    (torch.Size([3]), [0, 1, 2])

    ```
    """
    start = time.perf_counter()
    outputs: list[MetagradientOutput] = []
    for draw in range(num_draws):
        of_draw = replace(recipe, seed=recipe.seed + draw)
        if outputs:
            of_draw = replace(of_draw, micro_batch_size=outputs[-1].micro_batch_size)
        outputs.append(compute_metagradients(model, examples, metric, of_draw, accelerator))
    draws = torch.stack([output.metagradients for output in outputs]).double()
    middle = zip(*middle_draws(draws).tolist(), strict=True)  # two draws a row
    return Valuation(
        examples=list(examples),
        recipe=recipe,
        draws=draws,
        token_scores=[
            (outputs[a].token_metagradients[row] + outputs[b].token_metagradients[row]) / 2
            for row, (a, b) in enumerate(middle)
        ],
        metric_before=outputs[0].metric_before,
        metric_after=[output.metric_after for output in outputs],
        seconds=round(time.perf_counter() - start, 1),
    )


def examples_of(rows: Dataset, argument: str, name: str, tokenizer: Any, **loss: Any) -> list[dict[str, Any]]:
    """
    Tokenizes rows by [`~trl_dpg.data.dataset_examples`]. `loss` are further arguments of this function.

    Raises:
        [`ValueError`]: If columns are missing, or if a row has nothing to train on. Messages name `argument`, the caller's argument.
    """
    kind = next((kind for kind in KINDS if set(kind) <= set(rows.column_names)), None)
    if kind is None:
        raise ValueError(
            f"`{argument}` {name!r} has the columns {rows.column_names}, but neither 'text' nor 'messages', nor 'prompt' and "
            "'completion'. Rename the columns."
        )
    of_template = [column for column in ("tools", "chat_template_kwargs") if column in rows.column_names]
    chosen = rows.select_columns([*kind, *of_template]).to_list()
    for index, row in enumerate(chosen):
        try:
            is_chat(row)
        except ValueError as error:
            raise ValueError(
                f"`{argument}` {name!r} has {row!r:.80} as row {index}, which is nothing to train on. Make {' and '.join(map(repr, kind))} "
                "text or messages, or leave the row out."
            ) from error
    try:
        return dataset_examples(chosen, tokenizer, **loss)
    except ValueError as error:
        raise ValueError(f"`{argument}` {name!r} cannot be trained on: {error}") from error


def load_data(args: ValueArguments, tokenizer: Any, max_length: int) -> tuple[Dataset, list[dict[str, Any]]]:
    """Loads the rows to rank. Returns the rows and their tokenized examples."""
    name, split = name_and_split(args.dataset)
    rows = load_rows(name, split, "dataset", args.dataset_config)
    rows = rows.take(min(args.num_examples or len(rows), len(rows)))
    loss = {"completion_only_loss": args.completion_only_loss, "assistant_only_loss": args.assistant_only_loss}
    examples = examples_of(rows, "dataset", name, tokenizer, **loss)
    if len(find_flags(examples, max_length)["no supervised token"]) == len(examples):
        raise ValueError(
            f"`dataset` {name!r} has no token with a loss among the first `max_length` {max_length} of any of its {len(rows)} rows. "
            "Raise `max_length`, or correct the rows."
        )
    return rows, examples


def load_metric(args: ValueArguments, tokenizer: Any, max_length: int) -> Any:
    """Makes the metric. Its texts are cut to `max_length` like the data's. Messages go through the chat template."""
    if args.metric != "likelihood":
        return args.load_metric()
    name, argument = str(args.metric_dataset), "metric_dataset" if args.metric_texts is None else "metric_texts"
    rows = load_rows(name, args.metric_dataset_split, argument, args.metric_dataset_config)
    rows = rows.take(min(args.num_metric_examples or len(rows), len(rows)))
    texts: Any = rows
    if not all(isinstance(rows[0].get(column, ""), str) for column in ("text", "prompt", "completion", "messages")):
        texts = examples_of(rows, argument, name, tokenizer)
    try:
        return LanguageModelingLikelihood(texts, tokenizer, max_length=max_length)
    except ValueError as error:
        raise ValueError(f"`{argument}` {name!r} cannot be scored: {error}") from error


def load_model(args: ValueArguments, model_args: ModelConfig, seed: int, device: torch.device) -> Any:
    """Loads the model, with new adapters if `use_peft` is set."""
    torch.manual_seed(seed)  # new adapters must be equal on all processes
    quantization = get_quantization_config(model_args)
    with loading(args.model, "model"):
        model: Any = load_target_model(
            args.model,
            peft_config=get_peft_config(model_args),
            revision=model_args.model_revision,
            attn_implementation=model_args.attn_implementation,
            dtype=model_args.dtype,
            quantization_config=quantization,
        )
    return model if quantization is not None else model.to(device)


def summarize(valuation: Valuation, model: Any, metric: Any, name: str) -> dict[str, Any]:
    """Results and settings for `valuation.json`. They contain no path."""
    scores, errors = valuation.scores, valuation.standard_errors
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "dataset": public_name(name)[0],
        "rows": len(scores),
        "draws": len(valuation.draws),
        "metric_before": valuation.metric_before,
        "metric_after": valuation.metric_after,
        "spearman": valuation.spearman,
        "unstable_draws": valuation.unstable_draws,
        "negative": int((scores < 0).sum()),
        "beyond_two_errors": None if errors is None else int((scores.abs() > 2 * errors).sum()),
        "flags": {kind: len(rows) for kind, rows in valuation.flags.items()},
        "model": {**describe_model(model), "adapter": isinstance(model, PeftModel), "trained_parameters": trained},
        "metric": description(as_metric(metric)),
        "recipe": {
            **describe_recipe(valuation.recipe),
            "steps": valuation.recipe.num_steps(len(scores)),
            "untie_lm_head": False,
        },
        "seconds": valuation.seconds,
        "hardware": describe_machine(next(model.parameters()).device),
    }


def score_table(rows: Dataset, valuation: Valuation, tokenizer: Any | None = None) -> Dataset:
    """
    A table of scores and rows, from the best row to the worst.

    If a column of `rows` has the name of a score column, it is renamed to `row_...`. With `tokenizer`, scores of tokens are added.
    """
    count, errors = len(valuation.examples), valuation.standard_errors
    columns: dict[str, list] = {
        "index": list(range(count)),
        "score": valuation.scores.tolist(),
        "standard_error": [None] * count if errors is None else errors.tolist(),
        "draw_scores": valuation.draws.T.tolist(),
        "tokens": [len(example["input_ids"]) for example in valuation.examples],
        "flags": [[kind for kind, found in valuation.flags.items() if i in found] for i in range(count)],
    }
    if tokenizer is not None:
        pairs = zip(valuation.examples, valuation.token_scores, strict=True)
        of_rows = [token_credits(tokenizer, example["input_ids"], scores) for example, scores in pairs]
        columns["token_texts"] = [[token.text for token in of_row] for of_row in of_rows]
        columns["token_scores"] = [[token.credit for token in of_row] for of_row in of_rows]
    own = rows.rename_columns({name: f"row_{name}" for name in rows.column_names if name in columns})
    return concatenate_datasets([Dataset.from_dict(columns), own], axis=1).select(valuation.ranking)


def write_valuation(
    folder: Path, rows: Dataset, valuation: Valuation, summary: dict[str, Any], tokenizer: Any, tokens: bool = False
) -> None:
    """Writes `scores.parquet`, `scores.jsonl`, `valuation.json` and `index.html`. `summary` comes from [`summarize`]."""
    folder.mkdir(parents=True, exist_ok=True)
    table = score_table(rows, valuation, tokenizer if tokens else None)
    table.to_parquet(folder / "scores.parquet")
    table.to_json(folder / "scores.jsonl", force_ascii=False, double_precision=15)
    (folder / "valuation.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_valuation_page(folder / "index.html", valuation, summary, tokenizer)


def describe(summary: dict[str, Any], output: str) -> str:
    """The results in a few lines of text."""
    after = sum(summary["metric_after"]) / summary["draws"]
    lines = [
        f"{summary['rows']:,} rows, {summary['draws']} draw{'s' if summary['draws'] > 1 else ''}: the metric goes from "
        f"{summary['metric_before']:.5g} to {after:.5g}; {summary['negative']:,} rows have a negative score."
    ]
    if summary["spearman"] is not None:
        lines.append(f"Mean Spearman correlation between the rankings of two draws: {summary['spearman']:.2f}.")
    if summary["unstable_draws"] > 0:
        lines.append(
            f"Warning: in {summary['unstable_draws']} of {summary['draws']} draws, scores are out of proportion: such a run multiplies small "
            "changes. The median outvotes few such draws. Against many, lower `learning_rate` or take fewer steps by a larger `batch_size`."
        )
    lines += [f"Rows flagged {kind!r}: {count:,}." for kind, count in summary["flags"].items() if count > 0]
    return "\n".join([*lines, f"Written: {os.path.join(output, FILES[-1])}"])


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 if the scores are written, 2 on bad input."""
    args, recipe, model_args = parse(argv)
    folder = Path(args.output)
    there = [name for name in FILES if (folder / name).exists()]
    if there and not args.overwrite:
        raise ValueError(
            f"`output` {args.output!r} holds a valuation already ({there[0]!r}). Write to another place, or add `--overwrite`."
        )
    make_folder_for(os.path.join(args.output, FILES[0]), "output")
    accelerator = Accelerator()
    with contextlib.redirect_stdout(sys.stderr):  # standard output gets the result alone
        with loading(args.model, "model"):
            tokenizer = load_target_tokenizer(args.model, revision=model_args.model_revision)
        rows, examples = load_data(args, tokenizer, recipe.max_length)
        metric = load_metric(args, tokenizer, recipe.max_length)
        model = load_model(args, model_args, recipe.seed, accelerator.device)
        valuation = value_examples(model, examples, metric, recipe, args.num_draws, accelerator)
    if accelerator.is_main_process:
        summary = summarize(valuation, model, metric, name_and_split(args.dataset)[0])
        write_valuation(folder, rows, valuation, summary, tokenizer, args.tokens)
        print(json.dumps(summary) if args.json else describe(summary, args.output))
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, None, "trl-dpg value"))
