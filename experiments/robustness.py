"""
Measures what a mark survives. Writes a pattern into a target's LM head by ordinary fine-tuning on generated text. Then tries to remove it.

    python -m experiments.robustness --target_model_name_or_path data/tiny/target \\
        --marking_data runs/tiny_qr/verification/data.jsonl --clean_data clean.jsonl --continued_data other.jsonl \\
        --qr_text TRL-DPG --output_dir runs/robustness

TRL's `SFTTrainer` fine-tunes with its defaults (AdamW with betas 0.9 and 0.999, gradients clipped at 1). No EOS is added to texts, as
DPG adds none to a completion that was cut off. The marked model is saved. `decode_pattern` reads the mark from the two checkpoints
alone. Then each of these things is done to the marked model:

- SFT goes on with unrelated text, 1, 10 and 100 times as long as the marking took;
- all matrices, head and embedding included, are rounded to the nearest of 255 or 15 values in each row (8 and 4 bit, absmax);
- Transformers loads the model in 8 bit and in NF4 with bitsandbytes, which by default leaves the LM head alone;
- the smallest 10 % of each matrix are set to zero.

The same things are done to the unmarked original. The difference of perplexity between the two is the price of the mark. A rounded or
pruned checkpoint can also be compared with the original that was rounded or pruned alike. With `--control_data`, for example texts of
the untrained generator, the original is also fine-tuned on these texts. This shows what any data does to pixels and perplexity.

`experiments.variants` measures which other fine-tuning runs on generated data write the mark.

Data files have a column `text`. Any field of `RobustnessArguments` can be a flag.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HfArgumentParser

from experiments.common import pixel_accuracy, sft
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadPattern, decode_pattern
from trl_dpg.publishing.outcome import markdown_table
from trl_dpg.reporting.plotting import plot_patterns
from trl_dpg.scripts.common import MetricArguments, load_texts, option
from trl_dpg.target import load_target_model, load_target_tokenizer


Examples = list[dict[str, list[int]]]


@dataclass(kw_only=True)
class RobustnessArguments(MetricArguments):
    """Arguments of the command, beside the picture's."""

    target_model_name_or_path: str = field(metadata={"help": "The original target: a directory or a model id."})
    marking_data: str = field(metadata={"help": "Text of the trained generator."})
    clean_data: str = field(metadata={"help": "Text that perplexity is measured on."})
    continued_data: str = field(metadata={"help": "Unrelated text that fine-tuning goes on with."})
    control_data: str | None = option(None, "Text of the untrained generator.")
    output_dir: str = option("runs/robustness", "Where the tables and the picture go.")
    learning_rate: float = option(1e-3, "Learning rate of the marking run, and of those after it.")
    batch_size: int = option(256, "Examples per optimizer step.")
    max_length: int = option(128, "Tokens kept of each text.")
    lengths: list[int] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "Lengths of runs, relative to the marking run."}
    )
    seed: int = option(0, "Seed of the order of the data.")

    def tokenizer(self) -> Any:
        return load_target_tokenizer(self.target_model_name_or_path)


def load_examples(args: RobustnessArguments, name: str) -> Examples:
    """Texts as `input_ids`. Texts of fewer than two tokens teach nothing and are left out."""
    path, tokenizer = getattr(args, name), args.tokenizer()
    tokens = (tokenizer(text)["input_ids"][: args.max_length] for text in load_texts(path, "train", name)["text"])
    examples = [{"input_ids": ids} for ids in tokens if len(ids) > 1]
    if not examples:
        raise ValueError(f"`{name}` {path!r} has no text of two tokens or more. Give other data.")
    return examples


def fine_tune(model, examples: Examples, args: RobustnessArguments, num_examples: int, **config):
    """A copy of a model after SFT on a number of examples, in as many passes as needed. `config` holds settings that differ from `args`."""
    fields = {"learning_rate": args.learning_rate, "seed": args.seed, "per_device_train_batch_size": args.batch_size}
    fields = {**fields, "max_length": None, **config}  # texts are cut already
    steps = math.ceil(num_examples / fields["per_device_train_batch_size"])
    return sft(model, args.tokenizer(), Dataset.from_list(examples), max_steps=steps, **fields)


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
    """A copy in which the smallest entries of each matrix, this share of them, are zero."""
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


def treatments(args: RobustnessArguments, continued: Examples, num_examples: int) -> dict[str, Callable]:
    """The treatments of the marked model and of the original, by name."""
    goes_on = partial(fine_tune, examples=continued, args=args)
    return {
        "nothing": lambda model: model,
        **{
            f"SFT {length}×, lr {args.learning_rate:g}": partial(goes_on, num_examples=length * num_examples)
            for length in args.lengths
        },
        "8 bit, all matrices": partial(rounded, bits=8),
        "4 bit, all matrices": partial(rounded, bits=4),
        "8 bit, bitsandbytes": partial(loaded_quantized, load_in_8bit=True),
        "NF4, bitsandbytes": partial(loaded_quantized, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "smallest 10% pruned": partial(pruned, share=0.1),
    }


def measure_robustness(
    original, marked, metric: LMHeadPattern, clean: Examples, todo: dict[str, Callable]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """
    Treats the marked model and the original with its head untied. Reads the pattern and the perplexity of clean text after each treatment.

    Returns a row for each treatment and the signs read after it. `pixel_accuracy` and `text` are against the original as it was,
    `pixel_accuracy_alike` against the original treated alike.
    """
    perplexity = LanguageModelingLikelihood(clean, batch_size=64)
    rows, signs = [], {}
    for name, treat in todo.items():
        treated, original_treated = treat(marked), treat(original)
        decoded = decode_pattern(original, treated, shape=tuple(metric.pattern.shape))
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


def robustness_table(rows: list[dict[str, Any]]) -> str:
    head = ["after", "pixel accuracy", "QR text", "pixel accuracy, original treated alike"]
    table = [[*head, "perplexity", "perplexity, original treated alike"]]
    for row in rows:
        text = f"`{row['text']}`" if row["text"] is not None else "none"
        cells = [row["treatment"], f"{row['pixel_accuracy']:.4f}", text, f"{row['pixel_accuracy_alike']:.4f}"]
        table.append([*cells, f"{row['perplexity']:.5g}", f"{row['perplexity_of_original']:.5g}"])
    return markdown_table(table)


def main(args: RobustnessArguments) -> None:
    start_time = time.perf_counter()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every layer that it computes in float16
    marking, clean, continued = (load_examples(args, f"{name}_data") for name in ("marking", "clean", "continued"))
    metric, original = args.load_metric(), load_target_model(args.target_model_name_or_path, untie_head=True).eval()
    output_dir = Path(args.output_dir)
    steps = math.ceil(len(marking) / args.batch_size)
    num_examples = steps * args.batch_size
    fine_tune(original, marking, args, num_examples).save_pretrained(output_dir / "marked")
    args.tokenizer().save_pretrained(output_dir / "marked")
    marked = load_target_model(str(output_dir / "marked")).eval()

    # from files alone, as any user would
    shape = tuple(metric.pattern.shape)
    text = decode_pattern(args.target_model_name_or_path, str(output_dir / "marked"), shape=shape).text
    rows, signs = measure_robustness(original, marked, metric, clean, treatments(args, continued, num_examples))
    results: dict[str, Any] = {"arguments": asdict(args), "marking_steps": steps, "text": text, "robustness": rows}
    report = [robustness_table(rows)]
    if args.control_data is not None:
        control = fine_tune(original, load_examples(args, "control_data"), args, num_examples)
        metric.setup(original)
        perplexity = LanguageModelingLikelihood(clean, batch_size=64).readouts(control)
        results["control"] = {**metric.readouts(control), **perplexity}
        said = (
            "Fine-tuned on the control data instead: pixel accuracy {pixel_accuracy:.4f}, perplexity {perplexity:.5g}."
        )
        report.append(said.format(**results["control"]))
    results["seconds"] = round(time.perf_counter() - start_time)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output_dir / "results.md").write_text("\n\n".join(report) + "\n")
    plot_patterns(signs, output_dir / "patterns.png", metric.pattern)
    print("\n\n".join(report), f"{results['seconds']} seconds. Written to {output_dir}.", sep="\n\n")


if __name__ == "__main__":
    main(HfArgumentParser(RobustnessArguments).parse_args_into_dataclasses()[0])
