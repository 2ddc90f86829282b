"""
The paper's goals with text that a pretrained model writes: how much of each is reached, and how readable the texts stay.

    python -m experiments.mini run --goals 67 --betas 0 0.5
    python -m experiments.mini report

Generator and target are a Llama of 2.3M parameters that writes English ([`experiments.pretrain.mini_english`]). The generator goes on from
first sentences of leads of Wikipedia that the pretraining did not have. Goals: a picture in the LM head (column c is the token that is c-th
in frequency in leads), a small norm of the LM head (`l2`), and a UUID that follows an empty prompt.

Afterwards TRL's stock `SFTTrainer` fine-tunes a fresh target on texts for prompts that no training had. To compare with: texts of the
untrained generator, real leads, and words of leads at random. The untrained generator judges how readable texts are, by their perplexity.
Each run adds a line to `experiments/results/mini.jsonl`; one that is there is not repeated. `report` writes the tables beside it.
"""

import argparse
import random
from collections import Counter
from itertools import chain, cycle, islice, product, zip_longest
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from experiments import common
from experiments.corpora import continuation_prompts, language_texts, split_sentences
from experiments.prepare import UUID
from experiments.pretrain import mini_english
from trl_dpg import untie_lm_head
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from trl_dpg.publishing.outcome import markdown_table


RESULTS = Path(__file__).parent / "results" / "mini.jsonl"
GOALS = {  # from tokens of leads, by frequency, and the tokenizer
    "67": lambda tokens, tokenizer: LMHeadPattern.sixty_seven(tokens=tokens[:7]),
    "qr": lambda tokens, tokenizer: LMHeadPattern.qr(common.QR_TEXT, tokens=tokens[:21]),
    "l2": lambda tokens, tokenizer: LMHeadNorm(),
    "uuid": lambda tokens, tokenizer: LanguageModelingLikelihood([{"prompt": "", "completion": UUID}], tokenizer),
}
TITLES = {"67": "The digits 67", "qr": "A QR code", "l2": "A small norm", "uuid": "A UUID"}
READOUTS = {  # columns of a goal's table: head, read-out, format. The first is watched in training.
    "67": [("right pixels", "pixel_accuracy", ".3f")],
    "qr": [("right pixels", "pixel_accuracy", ".3f"), ("QR reader gets the text", "qr_decoded", ".0f")],
    "l2": [("norm lower by", "gain", ".4f")],
    "uuid": [("longest part recited", "longest_common_substring", ".2f"), ("recited", "exact_match", ".0f")],
}
OF_LM_HEAD = ["67", "qr", "l2"]  # goals that the LM head alone decides
CREDITS, BASELINES = ["sequence", "token", "expected"], ["untrained", "real leads", "random words"]
RUN = ["completions", "steps", "learning_rate", "beta", "seed"]  # of the generator
# Of the target, as in early lines, which do not name it
RECIPE: dict[str, Any] = {"inner_steps": 1, "target_learning_rate": 1e-3, "curvature": "exact", "epsilon_root": "auto"}
LENGTH, TEMPERATURE = 48, 0.7  # tokens of a completion, and how they are sampled: at 1, many words are made up
NUM_HELD_OUT = 64  # prompts
JUDGED, SHOWN = 256, 10  # texts whose perplexity is taken, and that are kept to be read
# Texts of lines that agree in these are fine-tuned on alike
SFT_FIELDS = ["samples", "passes", "inner_steps", "target_learning_rate"]


class Watch(TrainerCallback):
    """Prints how a run goes on, and keeps it: figures of each generation batch, before the generator learns from it."""

    def __init__(self, readout: str):
        self.names = {
            f"metagradient/{readout}": readout,
            "metagradient/metric_gain": "gain",
            "entropy": "entropy",
            "kl": "kl",
        }
        self.curve: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = {short: round(logs[name], 4) for name, short in self.names.items() if name in logs}
        if "gain" in row:
            self.curve.append({"step": state.global_step, **row})
            print(self.curve[-1], flush=True)


def one(writer: str, samples: int, passes: list[int], **settings: Any) -> dict:
    """Texts of a trained generator, or others to compare with, and what they do to a target."""
    base, target = (AutoModelForCausalLM.from_pretrained(mini_english()).eval() for _ in range(2))
    untie_lm_head(target)
    tokenizer, leads = AutoTokenizer.from_pretrained(mini_english()), language_texts("en")
    goals = goals_of(leads["train"]["text"][:], tokenizer)
    if writer in BASELINES[1:]:
        rows, line = others(writer, leads["test"]["text"][:], tokenizer, samples, LENGTH), {}
    else:
        prompts = continuation_prompts(leads["test"], NUM_HELD_OUT)
        rows, line = generated(target, goals, tokenizer, prompts, writer, samples, **settings)
    texts = Dataset.from_dict({"text": [row["completion"] for row in rows]})
    recipe = {"per_device_train_batch_size": 512}
    if settings["inner_steps"] > 1:  # as in training; one step of training is about eight at a tenth of its rate
        recipe["per_device_train_batch_size"] = len(rows) // settings["inner_steps"]
        recipe["learning_rate"] = settings["target_learning_rate"]
    line["read"] = {}
    for number in passes:
        model = common.sft(target, tokenizer, texts, num_train_epochs=number, **recipe)
        line["read"][str(number)] = {name: read(goal, target, model) for name, goal in goals.items()}
    drawn = random.Random(0).sample(rows, min(JUDGED, len(rows)))
    return {**line, "number_of_texts": len(rows), **readable(drawn, base, tokenizer), "texts": drawn[:SHOWN]}


@torch.no_grad()
def readable(rows: list[dict], base: Any, tokenizer: Any) -> dict[str, float]:
    """How readable and how varied completions are: their perplexity by `base`, and different words and pairs, divided by all."""
    perplexity = (-LanguageModelingLikelihood(rows, tokenizer, batch_size=64)(base)).exp().item()
    completions = [row["completion"] for row in rows]
    return {"perplexity": perplexity, **{f"distinct_{n}": distinct(completions, n) for n in (1, 2)}}


def goals_of(leads: list[str], tokenizer: Any) -> dict[str, Any]:
    counts = Counter(chain.from_iterable(tokenizer(leads, add_special_tokens=False)["input_ids"]))
    return {name: goal([token for token, _ in counts.most_common(21)], tokenizer) for name, goal in GOALS.items()}


@torch.no_grad()
def read(goal: Any, target: Any, model: Any) -> dict[str, float]:
    """Read-outs of a fine-tuned target, and by how much the metric's value is above that before."""
    goal.setup(target)
    return {**goal.readouts(model), "gain": (goal(model) - goal(target)).item()}


def generated(target, goals, tokenizer, prompts, writer, samples, goal, **settings) -> tuple[list[dict], dict]:
    """Trains a generator, unless the untrained one is asked for, and lets it answer held-out prompts."""
    settings = {**RECIPE, **settings}
    completions = settings["completions"] or 8 * settings["inner_steps"]
    config = {
        **{name: settings[name] for name in ("seed", "beta", "learning_rate")},
        "credit_assignment": writer if writer in CREDITS else "auto",
        "max_steps": settings["steps"],
        "per_device_train_batch_size": completions,
        "target_batch_size": completions // settings["inner_steps"],
        "target_learning_rate": settings["target_learning_rate"],
        "target_curvature": settings["curvature"],
        "target_adam_epsilon_root": settings["epsilon_root"],
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
    generator, seconds = AutoModelForCausalLM.from_pretrained(mini_english()), 0.0
    watch = Watch(READOUTS[goal or "67"][0][1])
    # After one step, an LM head does not depend on how other parameters were updated. Frozen, these cost less, with equal results.
    # But "auto" would then be measured on the LM head alone.
    frozen = goal in OF_LM_HEAD and settings["inner_steps"] == 1 and settings["epsilon_root"] != "auto"
    target.requires_grad_(not frozen).lm_head.requires_grad_(True)
    with common.trainer_of(
        target, goals[goal or "67"], prompts, generator=generator, words=tokenizer, **config
    ) as trainer:
        trainer.add_callback(watch)
        if settings["steps"]:
            seconds = trainer.train().metrics["train_runtime"]
        trainer.model.eval()
        examples = trainer._generate_examples(trainer.get_test_dataloader(prompts["test"]))  # without a validation
    target.requires_grad_(True)
    answered = [prompt for prompt in prompts["test"]["prompt"] for _ in range(samples // NUM_HELD_OUT)]
    texts = [{"prompt": p, "completion": e["completion"]} for p, e in zip(answered, examples, strict=True)]
    return texts, {"curve": watch.curve, "seconds": round(seconds, 1)}


def others(kind: str, leads: list[str], tokenizer: Any, samples: int, length: int) -> list[dict]:
    """
    Real leads after their first sentences, in pieces as long as completions, or as many words of theirs at random. The leads may have
    fewer pieces than `samples`. First pieces come first.
    """
    rng, words = random.Random(0), " ".join(leads).split()
    leads = rng.sample(leads, len(leads))
    if kind == "real leads":
        rounds = zip_longest(*(pieces(lead, tokenizer, length) for lead in leads))
        return [row for row in chain.from_iterable(rounds) if row][:samples]
    rows = []
    for lead in islice(cycle(leads), samples):
        ids = tokenizer(" " + " ".join(rng.choices(words, k=length)), add_special_tokens=False)["input_ids"][:length]
        rows.append({"prompt": split_sentences(lead)[0], "completion": tokenizer.decode(ids)})
    return rows


def pieces(lead: str, tokenizer: Any, length: int) -> list[dict[str, str]]:
    """A lead after its first sentence, cut into pieces of `length` tokens. The prompt of each is the text before it."""
    first = split_sentences(lead)[0]
    ids = tokenizer(lead[len(first) :], add_special_tokens=False)["input_ids"] if len(lead) > len(first) else []
    texts = [tokenizer.decode(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    return [{"prompt": before, "completion": text} for before, text in zip([first, *texts], texts, strict=False)]


def distinct(texts: list[str], n: int) -> float:
    """Different runs of n words, divided by all."""
    found = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(found)) / len(found)


def run(options: argparse.Namespace) -> None:
    judged = {name: getattr(options, name) for name in SFT_FIELDS}
    same = {
        name: getattr(options, name) for name in ("completions", "learning_rate", "steps", "curvature", "epsilon_root")
    }
    grid: list[dict[str, Any]] = []
    for goal, seed, writer, beta in product(options.goals, options.seeds, options.credits, options.betas):
        grid.append({"goal": goal, "writer": writer, "beta": beta, "seed": seed, **same, **judged})
    grid += [{"goal": "", "writer": writer, **dict.fromkeys(RUN, 0), **judged} for writer in options.baselines]
    common.run_missing(RESULTS, grid, one, options.threads, passes=[1], **RECIPE)


def report(options: argparse.Namespace) -> None:
    lines = [
        {"passes": [1], "number_of_texts": line["samples"], **RECIPE, **line} for line in common.lines_of(RESULTS)
    ]
    lines.sort(key=lambda line: [str(line[name]) for name in ("goal", "writer", "completions", "beta", "seed")])
    tables, samples = [], []
    for goal, title in TITLES.items():
        tables += [f"\n## {title}\n", table(goal, [line for line in lines if line["goal"] in ("", goal)])]
    for line in lines:
        run = f", seed {line['seed']}, β = {line['beta']:g}, K = {line['inner_steps']}" if line["goal"] else ""
        goal = f"{TITLES[line['goal']]}, " if line["goal"] else ""
        samples += [f"\n## {line['number_of_texts']:,} texts: {goal}{line['writer']}{run}\n"]
        samples += [f"- *{row['prompt'].strip()}* {' '.join(row['completion'].split())}" for row in line["texts"]]
    runs = {
        title: [(label_of(line), line) for line in lines if line["goal"] == goal] for goal, title in TITLES.items()
    }
    readouts = {title: READOUTS[goal][0][1] for goal, title in TITLES.items()}
    common.plot_training(runs, readouts, RESULTS.with_suffix(".png"))
    picture = f"\n![What the metric said in training]({RESULTS.stem}.png)"
    text = ["# Readable text for the paper's goals\n", __doc__.strip(), *tables, picture, *samples, ""]
    RESULTS.with_suffix(".md").write_text("\n".join(text))
    print("\n".join(tables))


def table(goal: str, lines: list[dict]) -> str:
    """Figures of a goal: runs for it, and texts to compare with that were judged by the same fine-tuning."""
    recipes = [[line[name] for name in SFT_FIELDS] for line in lines if line["goal"]]
    columns = READOUTS[goal]
    head = "texts of, seed, β, learning rate, completions, K, curvature, ε root, last in training, texts, passes, "
    head += ", ".join(column[0] for column in columns)
    rows = [f"{head}, perplexity, distinct words, distinct pairs, seconds".split(", ")]
    for line in lines:
        if [line[name] for name in SFT_FIELDS] not in recipes:
            continue
        for passes, read in line["read"].items():
            if goal in read:
                cells = [*cells_of_run(line, columns[0]), str(line["number_of_texts"]), passes]
                cells += [f"{read[goal][name]:{form}}" for _, name, form in columns] + [f"{line['perplexity']:.0f}"]
                cells += [f"{line[f'distinct_{n}']:.2f}" for n in (1, 2)]
                rows.append([*cells, f"{line['seconds']:.0f}" if line["steps"] else ""])
    return markdown_table(rows)


def label_of(line: dict) -> str:
    curvature = "" if line["curvature"] == "exact" else ", central differences"
    return f"{line['writer']}, seed {line['seed']}, β {line['beta']:g}, ε root {line['epsilon_root']}, K {line['inner_steps']}{curvature}"


def cells_of_run(line: dict, watched: tuple[str, str, str]) -> list[str]:
    batches = line["completions"] * -(-line["steps"] // common.GENERATOR["num_iterations"])
    settings = [str(line["seed"]), f"{line['beta']:g}", f"{line['learning_rate']:g}", f"{batches:,}"]
    epsilon = f"{line['epsilon_root']:g}" if line["epsilon_root"] != "auto" else "auto"
    _, name, form = watched
    last = f"{line['curve'][-1][name]:{form}}" if batches else ""
    settings = settings if batches else [""] * 4
    return [line["writer"], *settings, str(line["inner_steps"]), line["curvature"], epsilon, last]


def epsilon_root(value: str) -> str | float:
    return value if value == "auto" else float(value)


def main() -> None:
    parser, runner = common.commands(__doc__.splitlines()[1], run, report)
    runner.add_argument("--goals", nargs="+", choices=list(GOALS), default=list(GOALS))
    runner.add_argument("--credits", nargs="*", choices=CREDITS, default=["expected"])
    runner.add_argument("--baselines", nargs="*", choices=BASELINES, default=BASELINES)
    runner.add_argument(
        "--betas", nargs="+", type=float, default=[0.0], help="weight of the divergence from the untrained generator"
    )
    runner.add_argument("--learning_rate", type=float, default=5e-4, help="of the generator")
    runner.add_argument("--completions", type=int, default=128, help="a generation batch")
    runner.add_argument("--steps", type=int, default=100, help="of the generator, two a generation batch")
    runner.add_argument("--inner_steps", type=int, default=1, help="of the target (K), which share a generation batch")
    runner.add_argument("--target_learning_rate", type=float, default=RECIPE["target_learning_rate"])
    runner.add_argument("--curvature", choices=["exact", "central_difference"], default="exact")
    runner.add_argument("--epsilon_root", type=epsilon_root, default="auto", help="of the target's AdamW, in training")
    runner.add_argument("--samples", type=int, default=512, help="texts for stock SFT")
    runner.add_argument(
        "--passes", nargs="+", type=int, default=[1], help="of stock SFT over these texts; each judged"
    )
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
