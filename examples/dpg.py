"""
Trains a generator with Dataset Policy Gradients and validates it on held-out prompts.

    accelerate launch examples/dpg.py --config examples/configs/tiny_67.yaml
    accelerate launch examples/dpg.py --config examples/configs/smollm2_wikipedia.yaml

Configurations come in three scales: `tiny_*` (two CPU cores, minutes), `small_*` (SmolLM2-135M; one GPU, or hours of CPU) and
`paper_*` (the paper's models and sizes). Any field of `DPGScriptArguments`, `DatasetPolicyGradientConfig` (so also of `GRPOConfig`) or TRL's `ModelConfig` can stand
in the YAML file or follow as a flag. Everything that is written goes under `output_dir` (tables, logs and pictures under `results_dir`, where given).
"""

from trl_dpg.quiet import for_a_command  # isort: skip (before the imports that warn)

import json
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import resources
import torch
from datasets import Dataset, DatasetDict, load_dataset
from pretrain_tiny import tiny_multilingual
from transformers import TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern, evaluate_texts
from trl_dpg.publishing.facts import describe_machine
from trl_dpg.reporting.plotting import plot_learning_curve, plot_pattern
from trl_dpg.scripts.common import Parser, checkpoint_to_resume


@dataclass
class DPGScriptArguments:
    """Arguments of the example script."""

    target_model_name_or_path: str = field(
        default="openai-community/gpt2", metadata={"help": "Target: a model id, a directory, or 'tiny/target'."}
    )
    dataset: str = field(
        default="wikipedia",
        metadata={
            "help": "Prompts: 'wikipedia' (rephrase a lead), 'first_sentences' (of leads, to go on with), 'tiny' (three "
            "words) or 'hex' (hexadecimal digits).",
            "choices": ["wikipedia", "first_sentences", "tiny", "hex"],
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
        self.metric = str(self.metric)  # YAML reads an unquoted 67 as a number


class LikelihoodWithHeldOut(LanguageModelingLikelihood):
    """A likelihood that also reads out the perplexity of texts that it does not look at."""

    def __init__(self, dataset: list[dict[str, str]], held_out: list[dict[str, str]]):
        super().__init__(dataset)
        self.held_out = LanguageModelingLikelihood(held_out)

    def setup(self, model):
        super().setup(model)
        self.held_out.setup(model)

    @torch.no_grad()
    def readouts(self, model):
        perplexity = (-self.held_out(model)).exp().item()
        return {**super().readouts(model), "held_out_perplexity": perplexity}


def resolve_model(name: str, args: DPGScriptArguments, training_args: DatasetPolicyGradientConfig) -> str:
    """A model's name, or the directory of one that is built here."""
    directory = Path(training_args.output_dir) / "models"
    if name in ("tiny/generator", "tiny/target"):
        directories = resources.save_tiny_models(
            directory, training_args.seed, args.tiny_words, resources.ONE_SPECIAL_TOKEN
        )
        return directories[("tiny/generator", "tiny/target").index(name)]
    if name in ("hex/generator", "hex/target"):
        directories = resources.save_hex_models(directory, training_args.seed)
        return directories[("hex/generator", "hex/target").index(name)]
    if name == "tiny/multilingual":
        return tiny_multilingual(("en", "de", "it") if args.language in ("de", "it") else ("en", "es", "fr"))
    if args.offline and name == "HuggingFaceTB/SmolLM2-135M-Instruct":
        return resources.smollm2()
    return name


def load_leads(args: DPGScriptArguments, language: str) -> Dataset:
    """Shuffled leads of Wikipedia's articles, column `text`."""
    if args.offline:
        leads = resources.wikipedia_leads(language)
    else:
        articles = load_dataset("wikimedia/wikipedia", f"20231101.{language}", split="train[:100000]")
        leads = articles.map(lambda article: {"text": article["text"].split("\n\n")[0]})
        leads = leads.select_columns(["title", "text"]).filter(lambda lead: len(lead["text"]) >= 200)
    return leads.shuffle(seed=0)


def load_prompts(args: DPGScriptArguments) -> DatasetDict:
    """Prompts: splits `train` and `test`."""
    if args.dataset == "tiny":
        return resources.tiny_prompts(4096, args.validation_prompts, num_words=args.tiny_words)
    if args.dataset == "hex":
        return resources.hex_prompts(3072, args.validation_prompts)
    if args.dataset == "first_sentences":
        texts = resources.language_texts("en")["test"]
        return resources.continuation_prompts(texts, test_size=args.validation_prompts)
    leads = load_leads(args, "en")
    rest = leads.select(range(args.metric_examples, len(leads)))  # the first ones are for the metric
    return resources.rephrase_prompts(rest, args.max_prompt_words, test_size=args.validation_prompts)


def make_metric(args: DPGScriptArguments):
    """The metric, the read-out that its curve shows, and the texts that completions can be compared to."""
    if args.metric == "67":
        return LMHeadPattern.sixty_seven(scale="auto"), "pixel_accuracy", None
    if args.metric == "qr":
        return LMHeadPattern.qr(args.qr_text, scale="auto"), "pixel_accuracy", None
    if args.metric == "lm_head_norm":
        return LMHeadNorm(), "lm_head_norm", None
    if args.metric == "uuid":
        metric = LanguageModelingLikelihood([{"prompt": "", "completion": args.uuid}])
        return metric, "longest_common_substring", [args.uuid]
    if args.metric == "lambada":
        passages = load_dataset("EleutherAI/lambada_openai", args.language, split=f"test[:{args.metric_examples}]")[
            "text"
        ]
        pairs = (text.rsplit(" ", 1) for text in passages)
        rows = [{"prompt": start, "completion": f" {word}"} for start, word in pairs]
        return LanguageModelingLikelihood(rows), "exact_match", list(passages)
    if args.metric == "language" and args.dataset == "first_sentences":
        splits = resources.likelihood_texts(args.language, args.metric_examples, args.metric_examples)
        metric = LikelihoodWithHeldOut(list(splits["metric"]), list(splits["test"]))
        return metric, "held_out_perplexity", list(splits["metric"]["text"])
    leads = load_leads(args, args.language if args.metric == "language" else "en")
    texts = [" ".join(text.split()[: args.max_prompt_words]) for text in leads[: 2 * args.metric_examples]["text"]]
    rows = [{"text": text} for text in texts]
    if args.metric == "language":
        metric = LikelihoodWithHeldOut(rows[: args.metric_examples], rows[args.metric_examples :])
        return metric, "held_out_perplexity", texts[: args.metric_examples]
    return LanguageModelingLikelihood(rows[: args.metric_examples]), "metric_gain", texts[: args.metric_examples]


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
    steps_per_batch = args.steps_per_generation * args.num_iterations  # of micro-batches
    micro_steps = trainer.state.global_step * args.gradient_accumulation_steps
    is_split = args.reward == "naive" or not args.cross_group_batching
    num_datasets = args.num_generations if is_split else 1
    return {
        "generator": model_args.model_name_or_path,
        "target": script_args.target_model_name_or_path,
        "metric": script_args.metric,
        "reward": args.reward,
        "target_optim": args.target_optim,
        "target_steps": args.target_training_arguments().num_steps(args.generation_batch_size // num_datasets),
        "completions_per_generation_batch": args.generation_batch_size,
        "completions": micro_steps // steps_per_batch * args.generation_batch_size,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        # nats per token; a run shorter than `logging_steps` logs none
        "entropy": {"first": entropies[0], "last": entropies[-1]} if entropies else None,
        "seconds": round(seconds),
        "hardware": describe_machine(args.device),
    }


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
    prompts = load_prompts(script_args)
    metric, readout, reference_texts = make_metric(script_args)
    text_evaluation = None
    if script_args.metric in ("language", "lambada"):
        text_evaluation = partial(evaluate_texts, language=script_args.language)
    elif script_args.metric == "uuid":
        text_evaluation = partial(evaluate_texts, reference=script_args.uuid)
    trainer = DatasetPolicyGradientTrainer(
        model=generator,
        target_model=target,
        metric=metric,
        args=training_args,
        train_dataset=prompts["train"],
        eval_dataset=prompts["test"],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        reference_texts=reference_texts,
        text_evaluation=text_evaluation,
    )

    start_time = time.perf_counter()
    before = ValidateFirst(trainer, script_args.validation_draws)
    trainer.add_callback(before)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args.resume_from_checkpoint))
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
    picture = trainer.metric.picture()
    if picture is not None:
        run["decoded"] = ["".join("1" if sign > 0 else "-" for sign in row) for row in picture[0].tolist()]
    paths[0].write_text(json.dumps({**run, **summary}, indent=2) + "\n")
    paths[1].write_text(table + "\n")
    paths[2].write_text("".join(json.dumps(rounded(row)) + "\n" for row in trainer.state.log_history))
    plot_learning_curve(trainer.state.log_history, paths[3], readout)
    if picture is not None:
        paths.append(results_dir / "pattern.png")
        plot_pattern(*picture, paths[-1])
    print(
        f"\n{table}\n\n{seconds:.0f} seconds. Written:",
        *paths,
        f"{training_args.output_dir} (the generator)",
        sep="\n",
    )


if __name__ == "__main__":
    for_a_command()
    parser = Parser((DPGScriptArguments, DatasetPolicyGradientConfig, ModelConfig))
    main(*parser.parse_args_and_config())
