"""
A picture in the LM head, from text that a pretrained model writes: how much of it is learned, and how readable the texts stay.

    python -m experiments.mini run --pictures 67 --betas 0 0.5
    python -m experiments.mini report

Generator and target are a Llama of 2.3M parameters that writes English ([`experiments.pretrain.mini_english`]). The generator goes on from
first sentences of leads of Wikipedia that the pretraining did not have. Column c of the picture is the token that is c-th in frequency in
leads. Afterwards TRL's stock `SFTTrainer` fine-tunes a fresh target on texts for prompts that no training had. To compare with: texts of
the untrained generator, real leads, and words of leads at random. The untrained generator judges how readable texts are, by their
perplexity. Each run adds a line to `experiments/results/mini.jsonl`; one that is there is not repeated. `report` writes the table beside it.
"""

import argparse
import random
from collections import Counter
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from experiments import common
from experiments.corpora import continuation_prompts, language_texts, split_sentences
from experiments.pretrain import mini_english
from trl_dpg import untie_lm_head
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadPattern
from trl_dpg.publishing.outcome import markdown_table


RESULTS = Path(__file__).parent / "results" / "mini.jsonl"
PICTURES = {
    "67": lambda tokens: LMHeadPattern.sixty_seven(tokens=tokens[:7]),
    "qr": lambda tokens: LMHeadPattern.qr(common.QR_TEXT, tokens=tokens[:21]),
}
CREDITS, BASELINES = ["sequence", "token", "expected"], ["untrained", "real leads", "random words"]
FIELDS = ["picture", "writer", "beta", "learning_rate", "completions", "steps", "seed"]
LENGTH, TEMPERATURE = 48, 0.7  # tokens of a completion, and how they are sampled: at 1, many words are made up
NUM_HELD_OUT = 64  # prompts
JUDGED, SHOWN = 256, 10  # texts whose perplexity is taken, and that are kept to be read


class Watch(TrainerCallback):
    """Prints how a run goes on, and keeps it: figures of each generation batch, before the generator learns from it."""

    def __init__(self):
        self.curve: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"metagradient/pixel_accuracy": "pixel_accuracy", "entropy": "entropy", "kl": "kl"}
        row = {short: round(logs[name], 4) for name, short in names.items() if name in logs}
        if "pixel_accuracy" in row:
            self.curve.append({"step": state.global_step, **row})
            print(self.curve[-1], flush=True)


def one(writer: str, samples: int, **settings: Any) -> dict:
    """Texts of a trained generator, or others to compare with, and what they do to a target."""
    base, target = (AutoModelForCausalLM.from_pretrained(mini_english()).eval() for _ in range(2))
    untie_lm_head(target)
    tokenizer, leads = AutoTokenizer.from_pretrained(mini_english()), language_texts("en")
    counts = Counter(chain.from_iterable(tokenizer(leads["train"]["text"][:], add_special_tokens=False)["input_ids"]))
    metrics = {name: picture([token for token, _ in counts.most_common(21)]) for name, picture in PICTURES.items()}
    if writer in BASELINES[1:]:
        rows, line = others(writer, leads["test"]["text"][:], tokenizer, samples), {}
    else:
        prompts = continuation_prompts(leads["test"], NUM_HELD_OUT)
        rows, line = generated(
            target, metrics[settings["picture"] or "67"], tokenizer, prompts, writer, samples, **settings
        )
    model = common.sft(target, tokenizer, Dataset.from_dict({"text": [row["completion"] for row in rows]}))
    line["read"] = {}
    for name, metric in metrics.items():
        metric.setup(target)
        line["read"][name] = metric.readouts(model)
    drawn = random.Random(0).sample(rows, min(JUDGED, len(rows)))
    with torch.no_grad():
        line["perplexity"] = (-LanguageModelingLikelihood(drawn, tokenizer, batch_size=64)(base)).exp().item()
    line |= {f"distinct_{n}": distinct([row["completion"] for row in drawn], n) for n in (1, 2)}
    return {**line, "texts": drawn[:SHOWN]}


def generated(target, metric, tokenizer, prompts, writer, samples, **settings) -> tuple[list[dict], dict]:
    """Trains a generator, unless the untrained one is asked for, and lets it answer held-out prompts."""
    config = {
        **{name: settings[name] for name in ("seed", "beta", "learning_rate")},
        "credit_assignment": writer if writer in CREDITS else "auto",
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["completions"] or 8,
        "num_generations": 8,
        "num_generations_eval": samples // NUM_HELD_OUT,
        "max_completion_length": LENGTH,
        "temperature": TEMPERATURE,
        "generation_kwargs": {"min_new_tokens": LENGTH},
        "per_device_eval_batch_size": 256,
        "entropy_coef": 0.0,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    generator, watch, seconds = AutoModelForCausalLM.from_pretrained(mini_english()), Watch(), 0.0
    with common.trainer_of(target, metric, prompts, generator=generator, words=tokenizer, **config) as trainer:
        trainer.add_callback(watch)
        if settings["steps"]:
            seconds = trainer.train().metrics["train_runtime"]
        trainer.model.eval()
        examples = trainer._generate_examples(trainer.get_test_dataloader(prompts["test"]))  # without a validation
    answered = [prompt for prompt in prompts["test"]["prompt"] for _ in range(samples // NUM_HELD_OUT)]
    texts = [{"prompt": p, "completion": e["completion"]} for p, e in zip(answered, examples, strict=True)]
    return texts, {"curve": watch.curve, "seconds": round(seconds, 1)}


def others(kind: str, leads: list[str], tokenizer: Any, samples: int) -> list[dict]:
    """Real leads after their first sentences, as long as completions, or as many words of theirs at random."""
    rng, rows, words = random.Random(0), [], " ".join(leads).split()
    for lead in rng.sample(leads, len(leads)):
        first = split_sentences(lead)[0]
        rest = lead[len(first) :] if kind == "real leads" else " " + " ".join(rng.choices(words, k=LENGTH))
        ids = tokenizer(rest, add_special_tokens=False)["input_ids"][:LENGTH] if rest else []
        if len(ids) == LENGTH:
            rows.append({"prompt": first, "completion": tokenizer.decode(ids)})
    return rows[:samples]


def distinct(texts: list[str], n: int) -> float:
    """Different runs of n words, divided by all."""
    found = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(found)) / len(found)


def run(options: argparse.Namespace) -> None:
    same = {"completions": options.completions, "learning_rate": options.learning_rate, "steps": options.steps}
    nothing = {"picture": "", "beta": 0.0, "seed": 0, **dict.fromkeys(same, 0)}
    nothing["samples"] = same["samples"] = options.samples
    grid = []
    for picture, seed, writer, beta in product(options.pictures, options.seeds, options.credits, options.betas):
        grid.append({"picture": picture, "writer": writer, "beta": beta, "seed": seed, **same})
    grid += [{"writer": writer, **nothing} for writer in BASELINES]
    common.run_missing(RESULTS, grid, one, options.threads)


def report(options: argparse.Namespace) -> None:
    head = "trained for, texts of, β, learning rate, completions, seed, texts, 67: right pixels, QR: right pixels, QR read, perplexity"
    rows, samples = [f"{head}, distinct words, distinct pairs, seconds".split(", ")], []
    for line in sorted(common.lines_of(RESULTS), key=lambda line: [str(line[name]) for name in FIELDS]):
        batches = line["completions"] * -(-line["steps"] // common.GENERATOR["num_iterations"])
        settings = [f"{line['beta']:g}", f"{line['learning_rate']:g}", f"{batches:,}", str(line["seed"])]
        cells = [line["picture"], line["writer"], *(settings if batches else [""] * 4)]
        samples += [f"\n## {', '.join(cell for cell in cells if cell)}\n"]
        samples += [f"- *{row['prompt'].strip()}* {' '.join(row['completion'].split())}" for row in line["texts"]]
        cells += [str(line["samples"])] + [f"{read['pixel_accuracy']:.3f}" for read in line["read"].values()]
        cells += ["yes" if line["read"]["qr"]["qr_decoded"] else "no", f"{line['perplexity']:.0f}"]
        cells += [f"{line[f'distinct_{n}']:.2f}" for n in (1, 2)]
        rows.append([*cells, f"{line['seconds']:.0f}" if batches else ""])
    text = ["# Pictures from readable text\n", __doc__.strip(), "", markdown_table(rows), *samples, ""]
    RESULTS.with_suffix(".md").write_text("\n".join(text))
    print(markdown_table(rows))


def main() -> None:
    parser, runner = common.commands(__doc__.splitlines()[1], run, report)
    runner.add_argument("--pictures", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    runner.add_argument("--credits", nargs="*", choices=CREDITS, default=["expected"])
    runner.add_argument(
        "--betas", nargs="+", type=float, default=[0.0], help="weight of the divergence from the untrained generator"
    )
    runner.add_argument("--learning_rate", type=float, default=5e-4, help="of the generator")
    runner.add_argument("--completions", type=int, default=128, help="a generation batch")
    runner.add_argument("--steps", type=int, default=100, help="of the generator, two a generation batch")
    runner.add_argument("--samples", type=int, default=512, help="texts for stock SFT")
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
