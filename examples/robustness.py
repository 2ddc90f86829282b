"""
How long a mark lasts: writes a pattern into a target's LM head by ordinary fine-tuning on generated text, then tries to get
it out again.

    python examples/robustness.py --target_model_name_or_path runs/tiny_qr/models/.../target \\
        --marking_data runs/tiny_qr/samples.jsonl --clean_data clean.jsonl --continued_data other.jsonl \\
        --qr_text TRL-DPG --output_dir runs/robustness --lasting true

Fine-tuning is TRL's `SFTTrainer` with its defaults (AdamW with betas 0.9 and 0.999, gradients clipped at 1), on text as it is:
no EOS is added, as DPG adds none to a completion that was cut off. The marked model is saved and read back with
`decode_pattern`, from the two checkpoints alone. Then, each from the marked model:

- SFT goes on with unrelated text, 1, 10 and 100 times as long as the marking took, at the marking run's learning rate
  or others;
- all matrices, head and embedding included, are rounded to the nearest of 255 or 15 values in each row (8 and 4 bit, absmax);
- Transformers loads the model in 8 bit and in NF4 with bitsandbytes, which leaves the LM head alone unless told otherwise;
- the smallest 10 % of each matrix are set to zero.

All of it is done to the unmarked original too: what the mark costs in perplexity is the difference between the two, and who has
only a rounded or pruned checkpoint can compare it with the original rounded or pruned alike. With `--control_data` (say, the
untrained generator's), the original is also fine-tuned on that instead: what any data does to pixels and perplexity.

With `--lasting true`, a second table has the mark after other fine-tuning runs on the generated data itself: longer, with other
learning rates, batch sizes, orders and schedules.

Data files are JSON Lines, each row with `input_ids` or `text`. Any field of `RobustnessArguments` can be a flag.
"""

import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HfArgumentParser, PrinterCallback
from trl import SFTConfig, SFTTrainer

from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadPattern, decode_pattern
from trl_dpg.reporting.plotting import plot_patterns
from trl_dpg.target import load_target_model, load_target_tokenizer


@dataclass
class RobustnessArguments:
    """Arguments of the example script."""

    target_model_name_or_path: str = field(metadata={"help": "The original target: a directory or a model id."})
    clean_data: str = field(metadata={"help": "Text that perplexity is measured on."})
    continued_data: str = field(metadata={"help": "Unrelated text that fine-tuning goes on with."})
    marking_data: str | None = field(default=None, metadata={"help": "Text of the trained generator."})
    marked_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A target that is marked already, instead of `marking_data`."}
    )
    control_data: str | None = field(default=None, metadata={"help": "Text of the untrained generator."})
    output_dir: str = field(default="runs/robustness", metadata={"help": "Where the tables and the picture go."})
    pattern: str = field(default="qr", metadata={"help": "'qr', '67' or an image file."})
    qr_text: str = field(default="TRL-DPG", metadata={"help": "Text of the QR code."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the marking run."})
    batch_size: int = field(default=256, metadata={"help": "Examples per optimizer step."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Parts that a batch is computed in."})
    max_length: int = field(default=128, metadata={"help": "Tokens kept of each text."})
    marking_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of the marking run. Defaults to one pass over `marking_data`, or 1 without it."},
    )
    continued_learning_rates: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates of fine-tuning on unrelated text. Defaults to that of the marking run."},
    )
    lengths: list[int] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "Lengths of runs, relative to the marking run."}
    )
    lasting: bool = field(default=False, metadata={"help": "Whether to make the second table."})
    orders: int = field(default=3, metadata={"help": "Orders of the data in each cell of the second table."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of the data."})

    def __post_init__(self):
        if (self.marking_data is None) == (self.marked_model_name_or_path is None):
            raise ValueError("Give either `marking_data` or `marked_model_name_or_path`.")
        if self.lasting and self.marking_data is None:
            raise ValueError("`lasting` fine-tunes on the generated text: give `marking_data`.")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"`batch_size` ({self.batch_size}) must be a multiple of `gradient_accumulation_steps` "
                f"({self.gradient_accumulation_steps})."
            )


def load_examples(path: str, tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """Rows of a JSON Lines file as `input_ids`; those of fewer than two tokens teach nothing and are left out."""
    examples = []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            if "input_ids" not in row and "text" not in row:
                raise ValueError(
                    f"Line {number} of {path!r} has the fields {sorted(row)}: it needs 'input_ids' or 'text'."
                )
            ids = row["input_ids"] if "input_ids" in row else tokenizer(row["text"])["input_ids"]
            if len(ids) > 1:
                examples.append({"input_ids": ids[:max_length]})
    if not examples:
        raise ValueError(f"{path!r} has no text of two tokens or more.")
    return examples


def make_pattern(args: RobustnessArguments) -> LMHeadPattern:
    if args.pattern == "qr":
        return LMHeadPattern.qr(args.qr_text)
    if args.pattern == "67":
        return LMHeadPattern.sixty_seven()
    return LMHeadPattern.from_image(args.pattern)


def fine_tune(
    model,
    examples: list[dict[str, list[int]]],
    args: RobustnessArguments,
    tokenizer,
    num_examples: int,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    schedule: str = "constant",
    seed: int | None = None,
):
    """
    Fine-tunes a copy of a model with TRL's `SFTTrainer`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to start from.
        examples (`list[dict]`):
            Dicts with `input_ids`.
        args ([`RobustnessArguments`]):
            Arguments of the script, for what is not given here.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, for its padding token.
        num_examples (`int`):
            Examples to train on, in as many passes as it takes.
        learning_rate (`float`, *optional*):
            Peak learning rate.
        batch_size (`int`, *optional*):
            Examples per step.
        schedule (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule.
        seed (`int`, *optional*):
            Seed of the order.

    Returns:
        [`~transformers.PreTrainedModel`]: The fine-tuned copy, on the CPU and in eval mode.
    """
    batch_size = batch_size or args.batch_size
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig(
            output_dir=directory,
            max_steps=math.ceil(num_examples / batch_size),
            per_device_train_batch_size=max(1, batch_size // args.gradient_accumulation_steps),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            learning_rate=learning_rate or args.learning_rate,
            lr_scheduler_type=schedule,
            seed=args.seed if seed is None else seed,
            max_length=None,  # cut already
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=deepcopy(model),
            args=config,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.cpu().eval()


@torch.no_grad()
def rounded(model, bits: int):
    """A copy whose matrices hold 2^bits − 1 values in each row, evenly spaced from −absmax to absmax."""
    model = deepcopy(model)
    for param in model.parameters():
        if param.ndim == 2:
            step = param.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            param.copy_((param / step).round() * step)
    return model


@torch.no_grad()
def pruned(model, share: float):
    """A copy in which this share of each matrix, its smallest entries, is zero."""
    model = deepcopy(model)
    for param in model.parameters():
        if param.ndim == 2:
            smallest = param.abs().flatten().topk(int(share * param.numel()), largest=False).indices
            param.view(-1)[smallest] = 0.0
    return model


def loaded_quantized(model, **config):
    """The model as Transformers loads it with bitsandbytes."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=BitsAndBytesConfig(**config), dtype=torch.float32
        ).eval()


def treatments(args: RobustnessArguments, continued, tokenizer, marking_examples: int) -> dict[str, Callable]:
    """What is done to the marked model, and to the original, by name."""

    def continue_training(length: int, learning_rate: float) -> Callable:
        return lambda model: fine_tune(model, continued, args, tokenizer, length * marking_examples, learning_rate)

    return {
        "nothing": lambda model: model,
        **{
            f"SFT {length}×, lr {learning_rate:g}": continue_training(length, learning_rate)
            for learning_rate in args.continued_learning_rates or [args.learning_rate]
            for length in args.lengths
        },
        "8 bit, all matrices": lambda model: rounded(model, 8),
        "4 bit, all matrices": lambda model: rounded(model, 4),
        "8 bit, bitsandbytes": lambda model: loaded_quantized(model, load_in_8bit=True),
        "NF4, bitsandbytes": lambda model: loaded_quantized(model, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "smallest 10% pruned": lambda model: pruned(model, 0.1),
    }


def measure_robustness(
    args: RobustnessArguments, original, marked, metric: LMHeadPattern, clean, todo: dict[str, Callable]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """
    Treats the marked model and the original, and reads the pattern and the perplexity after each treatment.

    Args:
        args ([`RobustnessArguments`]):
            Arguments of the script.
        original ([`~transformers.PreTrainedModel`]):
            Target before marking, its head untied.
        marked ([`~transformers.PreTrainedModel`]):
            Target after marking.
        metric ([`LMHeadPattern`]):
            Pattern asked for.
        clean (`list[dict]`):
            Text for the perplexity.
        todo (`dict[str, Callable]`):
            Treatments.

    Returns:
        `tuple[list[dict], dict[str, torch.Tensor]]`: A row for each treatment and the signs read after it.
        `pixel_accuracy` and `text` are against the original as it was, `pixel_accuracy_alike` against the original treated
        alike.
    """
    perplexity = LanguageModelingLikelihood(clean, batch_size=64)
    rows, signs = [], {}
    for name, treat in todo.items():
        treated, original_treated = treat(marked), treat(original)
        decoded = decode_pattern(args.target_model_name_or_path, treated, shape=tuple(metric.pattern.shape))
        signs[name] = decoded.signs
        metric.setup(original_treated)
        rows.append(
            {
                "treatment": name,
                "pixel_accuracy": pixel_accuracy(decoded.signs, metric),
                "text": decoded.text,
                "pixel_accuracy_alike": metric.readouts(treated)["pixel_accuracy"],
                "perplexity": perplexity.readouts(treated)["perplexity"],
                "perplexity_of_original": perplexity.readouts(original_treated)["perplexity"],
            }
        )
        print(rows[-1])
    return rows, signs


def measure_lasting(
    args: RobustnessArguments, original, marking, tokenizer, metric: LMHeadPattern, marking_examples: int
) -> list[dict[str, Any]]:
    """
    Fine-tunes the original on the generated text with other recipes, one setting changed at a time.

    Returns:
        `list[dict]`: A row for each recipe and length: `pixel_accuracy` and `decoded` (whether the QR code gives its text)
        of each order, and `passes` over the data.
    """
    recipes: dict[str, dict[str, Any]] = {
        "as marked": {},
        "linear schedule": {"schedule": "linear"},
        "learning rate ÷ 10": {"learning_rate": args.learning_rate / 10},
        "learning rate × 3": {"learning_rate": args.learning_rate * 3},
        "batch size ÷ 4": {"batch_size": max(1, args.batch_size // 4)},
    }
    rows = []
    for name, recipe in recipes.items():
        for length in args.lengths:
            num_examples = length * marking_examples
            row: dict[str, Any] = {"recipe": name, "length": length, "passes": num_examples / len(marking)}
            decoded = []
            for order in range(args.orders):
                model = fine_tune(original, marking, args, tokenizer, num_examples, seed=args.seed + order, **recipe)
                shape = tuple(metric.pattern.shape)
                decoded.append(decode_pattern(args.target_model_name_or_path, model, shape=shape))
            row["pixel_accuracy"] = [pixel_accuracy(d.signs, metric) for d in decoded]
            row["decoded"] = [metric.text is not None and d.text == metric.text for d in decoded]
            rows.append(row)
            print(row)
    return rows


def pixel_accuracy(signs: torch.Tensor, metric: LMHeadPattern) -> float:
    return (signs == metric.pattern).double().mean().item()


def robustness_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| after | pixel accuracy | QR text | pixel accuracy, original treated alike | perplexity | perplexity, original "
        "treated alike |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["treatment"],
            f"{row['pixel_accuracy']:.4f}",
            f"`{row['text']}`" if row["text"] is not None else "none",
            f"{row['pixel_accuracy_alike']:.4f}",
            f"{row['perplexity']:.5g}",
            f"{row['perplexity_of_original']:.5g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def lasting_table(rows: list[dict[str, Any]]) -> str:
    """Mean pixel accuracy over orders, the worst in parentheses, and how many decode."""
    passes = {row["length"]: row["passes"] for row in rows}
    header = [f"{length}× ({share:.3g} passes)" for length, share in passes.items()]
    lines = [f"| recipe | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        cells = [
            f"{statistics.fmean(row['pixel_accuracy']):.4f} ({min(row['pixel_accuracy']):.4f}), "
            f"{sum(row['decoded'])}/{len(row['decoded'])}"
            for row in rows
            if row["recipe"] == name
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: RobustnessArguments) -> None:
    start_time = time.perf_counter()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every layer that it computes in float16
    tokenizer = load_target_tokenizer(args.target_model_name_or_path)
    data = {
        name: load_examples(path, tokenizer, args.max_length)
        for name in ("marking_data", "clean_data", "continued_data", "control_data")
        if (path := getattr(args, name)) is not None
    }
    metric = make_pattern(args)
    original = load_target_model(args.target_model_name_or_path, untie_head=True).eval()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    marking = data.get("marking_data", [])
    marking_steps = args.marking_steps or max(1, math.ceil(len(marking) / args.batch_size))
    marking_examples = marking_steps * args.batch_size
    if marking:
        fine_tune(original, marking, args, tokenizer, marking_examples).save_pretrained(output_dir / "marked")
        tokenizer.save_pretrained(output_dir / "marked")
    marked_name = args.marked_model_name_or_path or str(output_dir / "marked")
    marked = load_target_model(marked_name).eval()

    # from files alone, as anybody would
    decoded = decode_pattern(args.target_model_name_or_path, marked_name, shape=tuple(metric.pattern.shape))
    print(f"Marked: {pixel_accuracy(decoded.signs, metric):.4f} of the pixels, text {decoded.text!r}.")
    todo = treatments(args, data["continued_data"], tokenizer, marking_examples)
    rows, signs = measure_robustness(args, original, marked, metric, data["clean_data"], todo)
    results: dict[str, Any] = {
        "arguments": asdict(args),
        "marking_steps": marking_steps,
        "text": decoded.text,
        "robustness": rows,
    }
    report = [robustness_table(rows)]
    if "control_data" in data:
        control = fine_tune(original, data["control_data"], args, tokenizer, marking_examples)
        metric.setup(original)
        results["control"] = {
            **metric.readouts(control),
            **LanguageModelingLikelihood(data["clean_data"], batch_size=64).readouts(control),
        }
        report.append(
            "Fine-tuned on the control data instead: pixel accuracy {pixel_accuracy:.4f}, perplexity "
            "{perplexity:.5g}.".format(**results["control"])
        )
    if args.lasting:
        results["lasting"] = measure_lasting(args, original, marking, tokenizer, metric, marking_examples)
        report.append(
            "Fine-tuning on the generated text, so many times as long as the marking run: mean pixel accuracy (worst), "
            f"decoded, of {args.orders} orders.\n\n{lasting_table(results['lasting'])}"
        )
    results["seconds"] = round(time.perf_counter() - start_time)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output_dir / "results.md").write_text("\n\n".join(report) + "\n")
    plot_patterns(signs, output_dir / "patterns.png", metric.pattern)
    print("\n\n".join(report), f"{results['seconds']} seconds. Written to {output_dir}.", sep="\n\n")


if __name__ == "__main__":
    main(HfArgumentParser(RobustnessArguments).parse_args_into_dataclasses()[0])
