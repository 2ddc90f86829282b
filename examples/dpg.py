"""
Trains a generator with Dataset Policy Gradients and validates it on held-out prompts.

    accelerate launch examples/dpg.py --config examples/configs/tiny_67.yaml
    accelerate launch examples/dpg.py --config examples/configs/smollm2_wikipedia.yaml

Configurations come in three scales: `tiny_*` (two CPU cores, minutes), `small_*` (SmolLM2-135M; one GPU, or hours of CPU) and
`paper_*` (the paper's models and sizes). Any field of `DPGScriptArguments`, `DatasetPolicyGradientConfig` (so also of `GRPOConfig`) or TRL's `ModelConfig` can stand
in the YAML file or follow as a flag. Everything that is written goes under `output_dir` (tables, logs and pictures under `results_dir`, where given).
"""

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import resources
import torch
from datasets import DatasetDict, load_dataset
from transformers import TrainerCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from trl_dpg.plotting import plot_learning_curve, plot_pattern


@dataclass
class DPGScriptArguments:
    """Arguments of the example script."""

    target_model_name_or_path: str = field(
        default="openai-community/gpt2", metadata={"help": "Target: a model id, a directory, or 'tiny/target'."}
    )
    dataset: str = field(
        default="wikipedia",
        metadata={
            "help": "Prompts: 'wikipedia' (rephrase a lead), 'wikipedia_start' (go on with a lead, for models without a "
            "chat template), 'tiny' (three words) or 'hex' (three hexadecimal digits).",
            "choices": ["wikipedia", "wikipedia_start", "tiny", "hex"],
        },
    )
    tiny_words: int = field(default=60, metadata={"help": "Words that the tiny models know."})
    offline: bool = field(
        default=False,
        metadata={"help": "Take SmolLM2-135M-Instruct and the Wikipedia leads from PyPI packages instead of the Hub."},
    )
    max_prompt_words: int = field(default=30, metadata={"help": "Words kept of each Wikipedia lead."})
    metric: str = field(
        default="67",
        metadata={
            "help": "'67' or 'qr' (a pattern in the LM head), 'lm_head_norm', or the likelihood of texts: "
            "'wikipedia_likelihood' (leads that no prompt contains), 'language' (leads in `language`), 'lambada' (the last "
            "words of passages in `language`) or 'uuid' (a string, from an empty prompt).",
            "choices": ["67", "qr", "lm_head_norm", "wikipedia_likelihood", "language", "lambada", "uuid"],
        },
    )
    metric_examples: int = field(default=8, metadata={"help": "Texts that a likelihood looks at."})
    qr_text: str = field(default="TRL-DPG", metadata={"help": "Text of the QR code."})
    language: str = field(default="es", metadata={"help": "Language of 'language' and 'lambada', as an ISO code."})
    uuid: str = field(
        default="7f3c9a51e2d84b06a1c5f0e79d2b8364", metadata={"help": "The 32 hexadecimal digits of 'uuid'."}
    )
    validation_draws: int = field(
        default=1,
        metadata={"help": "Validations before and after training, each on fresh samples of held-out prompts."},
    )
    results_dir: str | None = field(
        default=None, metadata={"help": "Where tables, logs and pictures go. Defaults to `output_dir`."}
    )
    validation_prompts: int = field(default=32, metadata={"help": "Held-out prompts."})

    def __post_init__(self):
        self.metric = str(self.metric)  # YAML reads an unquoted 67 as a number, and does not look at `choices`
        for f in fields(self):
            choices = f.metadata.get("choices")
            if choices is not None and getattr(self, f.name) not in choices:
                raise ValueError(f"`{f.name}` must be one of {choices}, got {getattr(self, f.name)!r}.")


def resolve_model(name: str, args: DPGScriptArguments, training_args: DatasetPolicyGradientConfig) -> str:
    """A model's name, or the directory of one that is built here."""
    if name in ("tiny/generator", "tiny/target"):
        directory = Path(training_args.output_dir) / "models"
        directories = resources.save_tiny_models(directory, training_args.seed, args.tiny_words)
        return directories[("tiny/generator", "tiny/target").index(name)]
    if args.offline and name == "HuggingFaceTB/SmolLM2-135M-Instruct":
        return resources.smollm2()
    return name


def load_prompts(args: DPGScriptArguments) -> tuple[DatasetDict, list[dict[str, str]]]:
    """Prompts (`train`, `test`), and texts for the metric that are in neither."""
    if args.dataset == "tiny":
        return resources.tiny_prompts(4096, args.validation_prompts, num_words=args.tiny_words), []
    if args.offline:
        leads = resources.wikipedia_leads("en")
    else:
        articles = load_dataset("wikimedia/wikipedia", "20231101.en", split="train[:10000]")
        leads = articles.map(lambda article: {"text": article["text"].split("\n\n")[0]})
        leads = leads.select_columns(["title", "text"]).filter(lambda lead: len(lead["text"]) >= 200)
    leads = leads.shuffle(seed=0)
    texts = [
        {"text": " ".join(text.split()[: args.max_prompt_words])} for text in leads[: args.metric_examples]["text"]
    ]
    rest = leads.select(range(args.metric_examples, len(leads)))
    return resources.rephrase_prompts(rest, args.max_prompt_words, test_size=args.validation_prompts), texts


def make_metric(args: DPGScriptArguments, texts: list[dict[str, str]]):
    """The metric, and the read-out that its curve shows."""
    if args.metric == "67":
        return LMHeadPattern.sixty_seven(scale="auto"), "pixel_accuracy"
    if args.metric == "qr":
        return LMHeadPattern.qr(args.qr_text, scale="auto"), "pixel_accuracy"
    if args.metric == "lm_head_norm":
        return LMHeadNorm(), "metric_gain"
    return LanguageModelingLikelihood(texts), "metric_gain"


def summarize(before: list[dict[str, float]], after: list[dict[str, float]]) -> tuple[dict, str]:
    """Mean and standard error over draws of every validation figure, as a dict and as a Markdown table."""
    summary, lines = {}, ["| validation | untrained generator | trained generator |", "|---|---|---|"]
    of_the_loop = ("runtime", "per_second", "num_tokens")
    for key in [k for k in before[0] if k.startswith("eval_") and "/" not in k and not k.endswith(of_the_loop)]:
        cells = []
        for draws in (before, after):
            values = [draw[key] for draw in draws]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            cells.append({"mean": statistics.fmean(values), "standard_error": error, "draws": values})
        summary[key] = dict(zip(("untrained", "trained"), cells, strict=True))
        text = [
            f"{c['mean']:.6g}" + (f" ± {c['standard_error']:.2g}" if c["standard_error"] is not None else "")
            for c in cells
        ]
        lines.append(f"| `{key}` | {text[0]} | {text[1]} |")
    return summary, "\n".join(lines)


def describe_run(trainer, model_args: ModelConfig, script_args: DPGScriptArguments, seconds: float) -> dict:
    """What was run, and what it took."""
    args, log = trainer.args, trainer.state.log_history
    entropies = [row["entropy"] for row in log if "entropy" in row]
    steps_per_batch = args.steps_per_generation * args.num_iterations
    return {
        "generator": model_args.model_name_or_path,
        "target": script_args.target_model_name_or_path,
        "metric": script_args.metric,
        "reward": args.reward,
        "target_optim": args.target_optim,
        "target_steps": args.target_training_arguments().num_steps(args.generation_batch_size),
        "completions_per_generation_batch": args.generation_batch_size,
        "completions": trainer.state.global_step // steps_per_batch * args.generation_batch_size,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "entropy": {"first": entropies[0], "last": entropies[-1]},  # nats per token
        "seconds": round(seconds),
        "hardware": hardware(args.device),
    }


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the processor's and how many threads of it were used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def rounded(row: dict) -> dict:
    """A row of the log with five significant digits."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


class ValidateFirst(TrainerCallback):
    """Validates the untrained generator as `train` begins: what shards it has put it in place only then."""

    def __init__(self, trainer: DatasetPolicyGradientTrainer, draws: int):
        self.trainer, self.draws = trainer, draws
        self.results: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / "untrained.json"  # for a run that is resumed, whose generator no longer is
        if state.global_step == 0:
            self.results = [self.trainer.evaluate() for _ in range(self.draws)]
            if state.is_world_process_zero:
                path.write_text(json.dumps(self.results))
        else:
            self.results = json.loads(path.read_text())


def main(script_args: DPGScriptArguments, training_args: DatasetPolicyGradientConfig, model_args: ModelConfig) -> None:
    with training_args.main_process_first(desc="models that are built here"):
        generator = resolve_model(model_args.model_name_or_path, script_args, training_args)
        target = resolve_model(script_args.target_model_name_or_path, script_args, training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        **(training_args.model_init_kwargs or {}),
    }
    prompts, texts = load_prompts(script_args)
    metric, readout = make_metric(script_args, texts)
    trainer = DatasetPolicyGradientTrainer(
        model=generator,
        target_model=target,
        metric=metric,
        args=training_args,
        train_dataset=prompts["train"],
        eval_dataset=prompts["test"],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    start_time = time.perf_counter()
    before = ValidateFirst(trainer, script_args.validation_draws)
    trainer.add_callback(before)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    after = [trainer.evaluate() for _ in range(script_args.validation_draws)]
    seconds = time.perf_counter() - start_time
    if not trainer.is_world_process_zero():
        return

    results_dir = Path(script_args.results_dir or training_args.output_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    summary, table = summarize(before.results, after)
    paths = [
        results_dir / "results.json",
        results_dir / "results.md",
        results_dir / "log.jsonl",
        results_dir / "curve.png",
    ]
    run = describe_run(trainer, model_args, script_args, seconds)
    if isinstance(metric, LMHeadPattern):
        run["decoded"] = ["".join("1" if sign > 0 else "-" for sign in row) for row in metric.decoded.tolist()]
    paths[0].write_text(json.dumps({**run, **summary}, indent=2) + "\n")
    paths[1].write_text(table + "\n")
    paths[2].write_text("".join(json.dumps(rounded(row)) + "\n" for row in trainer.state.log_history))
    plot_learning_curve(trainer.state.log_history, paths[3], readout)
    if isinstance(metric, LMHeadPattern):
        paths.append(results_dir / "pattern.png")
        plot_pattern(metric.decoded, metric.pattern, paths[-1])
    print(
        f"\n{table}\n\n{seconds:.0f} seconds. Written:",
        *paths,
        f"{training_args.output_dir} (the generator)",
        sep="\n",
    )


if __name__ == "__main__":
    parser = TrlParser((DPGScriptArguments, DatasetPolicyGradientConfig, ModelConfig))
    main(*parser.parse_args_and_config())
