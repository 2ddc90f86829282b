"""
The paper's goals with SmolLM2-135M-Instruct as generator (LoRA) and as target (all parameters, an LM head of its own).

    python -m experiments.small run --goals 67 --seeds 0 1
    python -m experiments.small report

The generator goes on from first sentences of leads of Wikipedia. Goals: the digits 67 in the LM head (column c is the token that is c-th in
frequency in leads), a small norm of the LM head (`l2`), a UUID that follows an empty prompt, and the likelihood of 16 Spanish texts. The
gain of 64 other Spanish texts is shown, too.

Afterwards the generator writes texts for prompts that no training had. TRL's stock `SFTTrainer` takes one step on them with a fresh target.
This is done five times, each with new texts. To compare with: texts of the untrained generator, and real leads. The untrained generator
judges how readable texts are, by their perplexity. The *first gain in training* is that of the metric on the untrained generator's first
batch. There, AdamW has the `epsilon_root` of training, and in SFT it has none. Each run adds a line to
`experiments/results/small.jsonl`; one that is there is not repeated. `report` writes the table beside it.
"""

import argparse
import random
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import common
from experiments.corpora import continuation_prompts, language_texts, likelihood_texts, smollm2
from experiments.mini import OF_LM_HEAD, TITLES, Watch, goals_of, others, read, readable
from trl_dpg import untie_lm_head
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.publishing.outcome import markdown_table


RESULTS = Path(__file__).parent / "results" / "small.jsonl"
READOUTS = {"67": "pixel_accuracy", "l2": "gain", "uuid": "gain", "spanish": "gain"}  # that the report shows
HELD_OUT = {"spanish": "other spanish"}  # the same of texts that no training had
NAMES = {**TITLES, "spanish": "Spanish texts", "other spanish": "Spanish texts outside the metric"}
MEASURED = {"pixel_accuracy": "right pixels", "gain": "gain of the metric"}
BASELINES = ["untrained", "real leads"]
LENGTH, NUM_HELD_OUT, PROMPT_WORDS = 32, 64, 12  # tokens of a completion, prompts, words of a prompt at most
DRAWS, SHOWN = 5, 10
MICRO_BATCH = 32  # completions in memory at once
RUN = ["steps", "completions", "learning_rate", "beta", "epsilon_root", "seed"]  # of the generator
EARLY = {"epsilon_root": 1e-5}  # in lines that do not name it


def one(goal: str, writer: str, samples: int, target_learning_rate: float, **settings: Any) -> dict:
    """Texts of a trained generator, or others to compare with, and what they do to a target in each draw."""
    base, target = (AutoModelForCausalLM.from_pretrained(smollm2()).eval() for _ in range(2))
    untie_lm_head(target)
    tokenizer, leads = AutoTokenizer.from_pretrained(smollm2()), language_texts("en")
    goals = goals_of(leads["train"]["text"][:], tokenizer)
    del goals["qr"]
    spanish = likelihood_texts("es", 16, 64)
    goals["spanish"] = LanguageModelingLikelihood(spanish["metric"], tokenizer)
    goals[HELD_OUT["spanish"]] = LanguageModelingLikelihood(spanish["test"], tokenizer)
    if writer == "real leads":
        rows, line = others(writer, leads["test"]["text"][:], tokenizer, samples * DRAWS, LENGTH), {}
        if len(rows) < samples * DRAWS:
            raise ValueError(
                f"Real leads have {len(rows)} pieces, fewer than {DRAWS} draws of `--samples` {samples}. Leave them out of `--baselines`."
            )
        draws = [rows[start::DRAWS] for start in range(DRAWS)]
    else:
        prompts = continuation_prompts(leads["train"], NUM_HELD_OUT, PROMPT_WORDS)
        settings |= {"target_learning_rate": target_learning_rate, "credit_assignment": writer}
        draws, line = generated(target, goals, goal, tokenizer, prompts, samples, settings)
    line["read"] = [{} for _ in draws]
    for rows, found in zip(draws, line["read"], strict=True):
        texts = Dataset.from_dict({"text": [row["completion"] for row in rows]})
        steps = {"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": samples // MICRO_BATCH}
        model = common.sft(target, tokenizer, texts, learning_rate=target_learning_rate, **steps)
        found |= {name: read(goal, target, model) for name, goal in goals.items()}
    return {**line, **readable(draws[0], base, tokenizer), "texts": random.Random(0).sample(draws[0], SHOWN)}


def generated(target, goals, goal, tokenizer, prompts, samples, settings) -> tuple[list[list[dict]], dict]:
    """Trains a generator, unless the untrained one is asked for, and lets it answer held-out prompts several times."""
    completions, steps = settings["completions"] or MICRO_BATCH, settings["steps"]
    config = {
        **{name: settings[name] for name in ("seed", "beta", "learning_rate", "target_learning_rate")},
        "credit_assignment": settings["credit_assignment"] if steps else "auto",
        "max_steps": steps,
        "warmup_steps": 4,
        "bf16": True,  # of the generator alone
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": completions // MICRO_BATCH,
        "target_micro_batch_size": MICRO_BATCH,
        "target_adam_epsilon_root": settings["epsilon_root"],
        "num_generations": 4,
        "num_generations_eval": samples // NUM_HELD_OUT,
        "max_completion_length": LENGTH,
        "temperature": 1.0,
        "generation_kwargs": {"min_new_tokens": LENGTH},
        "per_device_eval_batch_size": samples,
        "entropy_coef": 0.0,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    watch, seconds = Watch(READOUTS[goal or "67"]), 0.0
    # After one step, an LM head does not depend on how other parameters were updated. Frozen, these cost less, with equal results.
    target.requires_grad_(goal not in OF_LM_HEAD).lm_head.requires_grad_(True)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    models = {"generator": AutoModelForCausalLM.from_pretrained(smollm2()), "words": tokenizer, "peft_config": lora}
    with common.trainer_of(target, goals[goal or "67"], prompts, **models, **config) as trainer:
        trainer.add_callback(watch)
        if steps:
            seconds = trainer.train().metrics["train_runtime"]
        trainer.model.eval()
        answered = [prompt for prompt in prompts["test"]["prompt"] for _ in range(samples // NUM_HELD_OUT)]
        draws = []
        for _ in range(DRAWS):
            written = trainer._generate_examples(trainer.get_test_dataloader(prompts["test"]))
            draws.append(
                [{"prompt": p, "completion": e["completion"]} for p, e in zip(answered, written, strict=True)]
            )
    target.requires_grad_(True)
    return draws, {"curve": watch.curve, "seconds": round(seconds, 1)}


def run(options: argparse.Namespace) -> None:
    judged = {"samples": options.samples, "target_learning_rate": options.target_learning_rate}
    same = {name: getattr(options, name) for name in RUN[:-1]}
    grid = [{"goal": "", "writer": writer, **dict.fromkeys(RUN, 0), **judged} for writer in options.baselines]
    for seed, goal, writer in product(options.seeds, options.goals, options.credits):
        grid.append({"goal": goal, "writer": writer, "seed": seed, **same, **judged})
    common.run_missing(RESULTS, grid, one, options.threads, **EARLY)


def report(options: argparse.Namespace) -> None:
    lines, samples = [{**EARLY, **line} for line in common.lines_of(RESULTS)], []
    head = "goal, measured, texts of, seed, β, ε root, completions, texts, rate of the target, first gain in training, mean, standard error, lowest, highest"
    rows = [f"{head}, perplexity, distinct pairs, minutes".split(", ")]
    for goal, readout in READOUTS.items():
        recipes = [(line["samples"], line["target_learning_rate"]) for line in lines if line["goal"] == goal]
        alike = [
            line
            for line in lines
            if line["goal"] == goal or not line["goal"] and (line["samples"], line["target_learning_rate"]) in recipes
        ]
        for name in (goal, HELD_OUT.get(goal)):
            rows += [cells_of(line, name, readout) for line in alike if name in line["read"][0]]
    for line in lines:
        of = f"{NAMES[line['goal']]}, seed {line['seed']}, " if line["goal"] else ""
        samples += [f"\n## Texts: {of}{line['writer']}\n"]
        samples += [f"- *{row['prompt'].strip()}* {' '.join(row['completion'].split())}" for row in line["texts"]]
    panels = {NAMES[goal]: [(label_of(line), line) for line in lines if line["goal"] == goal] for goal in READOUTS}
    readouts = {NAMES[goal]: readout for goal, readout in READOUTS.items()}
    common.plot_training(panels, readouts, RESULTS.with_suffix(".png"))
    picture = f"\n![What the metric said in training]({RESULTS.stem}.png)"
    text = [
        "# The paper's goals with SmolLM2-135M\n",
        __doc__.strip(),
        "",
        markdown_table(rows),
        picture,
        *samples,
        "",
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(text))
    print(markdown_table(rows))


def label_of(line: dict) -> str:
    return f"{line['writer']}, seed {line['seed']}, β {line['beta']:g}, ε root {line['epsilon_root']:g}, {line['completions']} a batch, {line['steps']} steps"


def cells_of(line: dict, goal: str, readout: str) -> list[str]:
    values = [draw[goal][readout] for draw in line["read"]]
    written = str(line["completions"] * -(-line["steps"] // common.GENERATOR["num_iterations"]))
    settings = [str(line["seed"]), f"{line['beta']:g}", f"{line['epsilon_root']:g}", written]
    figures = [mean(values), stdev(values) / len(values) ** 0.5, min(values), max(values)]
    return [
        *(
            NAMES[goal],
            MEASURED[readout],
            line["writer"],
            *(settings if line["goal"] else [""] * 4),
        ),
        *(str(line["samples"]), f"{line['target_learning_rate']:g}"),
        f"{line['curve'][0]['gain']:.4f}" if line["goal"] else "",
        *(f"{figure:.4f}" for figure in figures),
        *(f"{line['perplexity']:.0f}", f"{line['distinct_2']:.2f}"),
        f"{line['seconds'] / 60:.0f}" if line["goal"] else "",
    ]


def main() -> None:
    parser, runner = common.commands(__doc__.splitlines()[1], run, report)
    runner.add_argument("--goals", nargs="*", choices=list(READOUTS), default=list(READOUTS))
    runner.add_argument("--credits", nargs="+", choices=["sequence", "token", "expected"], default=["expected"])
    runner.add_argument("--baselines", nargs="*", choices=BASELINES, default=BASELINES)
    runner.add_argument(
        "--beta", type=float, default=0.1, help="weight of the divergence from the untrained generator"
    )
    runner.add_argument("--learning_rate", type=float, default=1e-3, help="of the generator")
    runner.add_argument("--epsilon_root", type=float, default=1e-5, help="of the target's AdamW, in training")
    runner.add_argument("--completions", type=int, default=64, help="a generation batch")
    runner.add_argument("--steps", type=int, default=50, help="of the generator, two a generation batch")
    runner.add_argument("--target_learning_rate", type=float, default=1e-4)
    runner.add_argument("--samples", type=int, default=256, help="texts of a draw, on which stock SFT takes one step")
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
