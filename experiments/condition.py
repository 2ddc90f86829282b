"""
A QR code in the LM head of a target that keeps its language: with and without a condition on its perplexity.

    python -m experiments.condition run --seeds 0 1 2
    python -m experiments.condition report

The target is a GPT-2 of 2 layers and width 64 that was pretrained on a language of 100 words, in which each word has four
successors: a random one has nothing to lose. A generator is trained as in `examples/configs/tiny_qr.yaml`, towards the QR code alone
and towards the code under the condition that the perplexity on clean texts stays within 1 %. Prompts are held out, and so are the
clean texts that `held_out_perplexity` is of. Each run adds a line to `experiments/results/condition.jsonl`; one that is there is
not repeated. `report` prints the table.
"""

import argparse
import random
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from examples.resources import ONE_SPECIAL_TOKEN, WORDS, tiny_causal_lm, tiny_prompts, tiny_tokenizer
from experiments.common import GENERATOR, NUM_WORDS, append, commands, lines_of
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import KeepBelow, LanguageModelingLikelihood, LMHeadPattern, Perplexity


RESULTS = Path(__file__).parent / "results" / "condition.jsonl"
ALLOWED = 1.01  # times the perplexity of the untouched target
LENGTH, SUCCESSORS = 24, 4
PRETRAINING_STEPS = 400
FIELDS = ["weight", "factor", "learning_rate", "completions", "seed", "steps"]
NUM_CLEAN = 128
VALIDATED = 512  # samples


def clean_texts(number: int, seed: int) -> list[dict[str, str]]:
    """Texts of a language in which each word has four successors, all as likely."""
    words = tiny_tokenizer(NUM_WORDS, ONE_SPECIAL_TOKEN).convert_ids_to_tokens(range(NUM_WORDS))
    grammar = random.Random("grammar")
    successors = {word: grammar.sample(words, SUCCESSORS) for word in words}
    rng, texts = random.Random(f"texts {seed}"), []
    for _ in range(number):
        text = [rng.choice(WORDS)]
        while len(text) < LENGTH:
            text.append(rng.choice(successors[text[-1]]))
        texts.append({"text": " ".join(text)})
    return texts


def pretrained_target(seed: int, steps: int) -> torch.nn.Module:
    """A target that has learned the language: its perplexity is near that of four equally likely words."""
    target = tiny_causal_lm(NUM_WORDS + len(ONE_SPECIAL_TOKEN), seed=seed, special_tokens=ONE_SPECIAL_TOKEN)
    optimizer = torch.optim.AdamW(target.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    tokenizer = tiny_tokenizer(NUM_WORDS, ONE_SPECIAL_TOKEN)
    for step in range(steps):
        optimizer.zero_grad()
        (
            -LanguageModelingLikelihood(clean_texts(64, seed=1000 * seed + step), tokenizer, batch_size=64)(target)
        ).backward()
        optimizer.step()
        schedule.step()
    return target.eval()


class Validate(TrainerCallback):
    """Validates every few steps: one step of the target on 512 fresh samples of held-out prompts."""

    def __init__(self, every: int):
        self.every = every
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            training = self.trainer.target_training
            recipe = training.args
            training.args = replace(recipe, batch_size=VALIDATED)  # one step, as in training
            values = self.trainer.evaluate()
            training.args = recipe
            of_untouched = {
                name: condition.factor * (1 - values[f"eval_{condition.name}_below_limit_by"])
                for name, condition in self.conditions.items()
            }
            read = {"pixel_accuracy": values["eval_pixel_accuracy"], "qr_decoded": values["eval_qr_decoded"]}
            self.curve.append({"step": state.global_step, **read, **of_untouched})
            print({name: round(value, 4) for name, value in self.curve[-1].items()}, flush=True)


def train(target: torch.nn.Module, settings: dict, every: int) -> dict:
    """One run: its validations, perplexities relative to those of the untouched target."""
    start = time.perf_counter()
    seed, completions = settings["seed"], settings["completions"]
    tokenizer = tiny_tokenizer(NUM_WORDS, ONE_SPECIAL_TOKEN)
    generator = tiny_causal_lm(NUM_WORDS + len(ONE_SPECIAL_TOKEN), seed=2 * seed, special_tokens=ONE_SPECIAL_TOKEN)
    clean, held_out = (Perplexity(clean_texts(NUM_CLEAN, seed=-n), tokenizer, batch_size=NUM_CLEAN) for n in (1, 2))

    def held_out_perplexity(model):
        return held_out(model)

    kept = {
        "perplexity": KeepBelow(clean, factor=settings["factor"]),
        "held_out": KeepBelow(held_out_perplexity, factor=ALLOWED),
    }
    metric = LMHeadPattern.qr("TRL-DPG") + settings["weight"] * kept["perplexity"] + 0 * kept["held_out"]
    prompts = tiny_prompts(4096, 32)
    callback = Validate(every)
    with tempfile.TemporaryDirectory() as directory:
        args = DatasetPolicyGradientConfig(
            directory,
            seed=seed,
            max_steps=settings["steps"],
            per_device_train_batch_size=completions,
            per_device_eval_batch_size=VALIDATED,
            num_generations=16,
            logging_strategy="no",
            **{**GENERATOR, "target_learning_rate": settings["learning_rate"]},
        )
        trainer = DatasetPolicyGradientTrainer(
            generator, target, metric, args, prompts["train"], prompts["test"], tokenizer, tokenizer,
            callbacks=[callback],
        )  # fmt: skip
        callback.trainer, callback.conditions = trainer, kept
        trainer.remove_callback(PrinterCallback)
        untouched = {name: condition.metric(target).item() for name, condition in kept.items()}
        trainer.train()
    return {
        **settings,
        "untouched": untouched,
        "curve": callback.curve,
        "seconds": round(time.perf_counter() - start, 1),
    }


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for seed in options.seeds:
        target = None
        for weight in options.weights:
            settings = dict(
                zip(
                    FIELDS,
                    (weight, options.factor, options.learning_rate, options.completions, seed, options.steps),
                    strict=True,
                )
            )
            if any(all(line[name] == settings[name] for name in FIELDS) for line in lines_of(RESULTS)):
                continue
            target = target or pretrained_target(2 * seed + 1, PRETRAINING_STEPS)
            line = train(target, settings, options.every)
            append(RESULTS, line)
            print(settings, line["curve"][-1], f"{line['seconds']} s", flush=True)


def report(options: argparse.Namespace) -> None:
    head = [
        "condition",
        "η of the target",
        "completions a step",
        "seed",
        "pixel accuracy",
        "code read",
        "perplexity",
        "held-out perplexity",
        "both held",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in sorted(lines_of(RESULTS), key=lambda line: [line[name] for name in FIELDS]):
        last = line["curve"][-1]
        kept = max(last["perplexity"], last["held_out"]) <= ALLOWED
        condition = f"weight {line['weight']:g}, limit {line['factor'] - 1:+.1%}" if line["weight"] else "none"
        cells = [
            condition,
            f"{line['learning_rate']:g}",
            line["completions"],
            line["seed"],
            f"{last['pixel_accuracy']:.4f}",
            "yes" if last["qr_decoded"] else "no",
        ]
        cells += [f"{last[name] - 1:+.2%}" for name in ("perplexity", "held_out")]
        cells += ["yes" if last["pixel_accuracy"] >= 0.99 and kept else "no"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))


def main() -> None:
    parser, runner = commands(__doc__.splitlines()[1], run, report)
    runner.add_argument("--weights", nargs="+", type=float, default=[0.0, 10000.0], help="of the condition")
    runner.add_argument(
        "--factor", type=float, default=1.005, help="limit in training, times the untouched perplexity"
    )
    runner.add_argument("--learning_rate", type=float, default=1.5e-3, help="of the target")
    runner.add_argument("--completions", type=int, default=512, help="a step")
    runner.add_argument("--steps", type=int, default=160)
    runner.add_argument("--every", type=int, default=20, help="steps between validations")
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
