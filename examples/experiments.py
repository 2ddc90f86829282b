"""
Runs the experiments of examples/results and writes its README from what the runs logged.

    python examples/experiments.py run tiny_67 --variants metagradient naive --seeds 0 1 2
    python examples/experiments.py report

A run that has its `results.json` is not repeated, and one that has a checkpoint goes on from it, so a command that was stopped
goes on where it was. `run` without names runs everything.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trl_dpg.metrics import LMHeadPattern
from trl_dpg.reporting.plotting import plot_learning_curves, plot_patterns


EXAMPLES = Path(__file__).parent
RESULTS = EXAMPLES / "results"


@dataclass
class Experiment:
    """One table: a configuration, and flags that make its variants."""

    title: str
    config: str
    readouts: dict[str, str]  # name in the logs -> heading
    variants: dict[str, str]
    flags: str = ""  # of all variants
    notes: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    curve: str | None = None  # what the learning curves show


INTRODUCTION = """
# Results

Credit is that of whole completions (`credit_assignment="sequence"`), as in the paper, unless a row says otherwise.

Written by `python examples/experiments.py report` from the logs of the runs, which `python examples/experiments.py run` makes.

Every figure but entropy is from validation: the generator answers held-out prompts, a fresh target is fine-tuned on that by
`torch.optim.AdamW` with the recipe of training, and the metric Φ and its read-outs are taken. A run's figure is the mean over
its `validation_draws`; a table's figure is the mean over seeds, in brackets the lowest and highest seed. A seed is that of the
random models, too. *Distinct* is the share of different texts among the trained generator's. *Entropy* is the generator's on
training batches, at the first and the last step logged. Each folder has the run's `results.json`, `log.jsonl` and pictures.
"""

OTHERS = """
## Other runs

- [`smollm2_wikipedia`](smollm2_wikipedia/results.md): `examples/configs/smollm2_wikipedia.yaml`, one training run, seed 0, two
  CPU cores shared with other work. It was made before the reward's scale had a floor, which its `metagradient/std` never comes
  near, and before `log.jsonl` held the validations from before training; those are in `results.json`.
- [`robustness`](robustness/results.md): what the QR code of `tiny_qr`, seed 0, survives, one thread of a CPU shared with other work, ten
  minutes. The target was marked with 4,096 texts of `python examples/verify.py --generator runs/tiny_qr/metagradient/seed_0 ...`, clean
  and unrelated text are words at random (`python examples/make_tiny.py`, then `head -2000 tiny/random.jsonl > clean.jsonl` and `tail -2096
  tiny/random.jsonl > other.jsonl`): `python examples/robustness.py --marking_data .../verification/samples.jsonl --clean_data clean.jsonl
  --continued_data other.jsonl --control_data tiny/random.jsonl --learning_rate 1e-4 --batch_size 512`.
- [`robustness_k8`](robustness_k8/results.md): the same for the generator of `tiny_qr`, K = 8, marked at learning rate 1e-3, with runs 1 and
  10 times as long as the marking, and other recipes on the generated text (`--learning_rate 1e-3 --lengths 1 10 --lasting true --orders 1`).
  A mark made for eight steps outlasts one made for one: it survives 4 bit and pruning, and 98.2 % of it as much fine-tuning on other text again; ten times as much erases it.
- [`closed_loop`](closed_loop/results.md): generator and target in turns, the target keeping what it learned, for the norm of its head
  (before `tiny_l2` had its entropy bonus), seed 0: `python examples/closed_loop.py --config examples/configs/tiny_l2.yaml --max_steps 60
  --rounds 8`. The norm falls for two rounds, stays, and rises from the fifth on, always below that of a target fine-tuned as long on the
  untrained generator's text.
- [`data_valuation`](data_valuation/results.md): `python examples/data_valuation.py --offline --output_dir
  examples/results/data_valuation`, seed 0, one draw of leads and one ranking, two CPU cores shared with other work. The
  learning rate was chosen between two on undamaged leads; the kinds of damage and the seed were not tuned. It was made with the
  engine as it was before it kept its parameters in one flat tensor.
"""

REWARDS = {
    "metagradient": "",
    # a lower rate than the configurations': at 3e-3, texts of these two shrank to nothing for one seed of the 67 in three
    "metagradient, SGD": "--target_optim sgd --target_learning_rate 0.1 --learning_rate 1e-3",
    "metagradient, one completion per prompt": "--cross_group_batching false --learning_rate 1e-3",
    "naive": "--reward naive",
}
# What the paper does, and what all variants do that do not say otherwise
SEQUENCE = "--credit_assignment sequence"

# As many completions and optimizer steps of the generator, in an eighth of the generation batches; validation of eight steps, too
EIGHT_STEPS = "--target_batch_size 256 --steps_per_generation 8 --validation_prompts 256"
NINETY_SIX_STEPS = "--target_batch_size 64 --steps_per_generation 24 --validation_prompts 768 --validation_draws 3"
PIXELS = {"pixel_accuracy": "pixel accuracy"}

# A quarter of the batch and a few of the steps, for an hour or two of one CPU thread
PART = "--use_cpu true --bf16 true --max_completion_length 32 "
PART += "--target_max_length 40 --eval_steps 10 --save_steps 5 --validation_draws 3 "
PART += "--per_device_eval_batch_size 32 --validation_prompts 64 --num_generations_eval 1 --max_prompt_words 24"

SETTINGS = "--max_steps 120 --validation_draws 3 --eval_steps 30 --load_best_model_at_end false "
SETTINGS += "--adam_beta2 0.999 --max_grad_norm 1 --entropy_coef 0 "

EXPERIMENTS = {
    "tiny_qr": Experiment(
        "A QR code in the LM head",
        "tiny_qr.yaml",
        {**PIXELS, "qr_decoded": "QR code read"},
        {
            "metagradient, expected credit": "--credit_assignment expected --tiny_words 100 --max_steps 160 --eval_steps 80 --save_steps 80 "
            "--validation_prompts 32 --validation_draws 3 --logging_steps 20",
            **REWARDS,
            "metagradient, K = 8": "--target_batch_size 512 --steps_per_generation 8 --validation_prompts 512 "
            "--validation_draws 2",
        },
        flags="--tiny_words 44 --max_steps 600 --eval_steps 100 --save_steps 100 --validation_prompts 64",
        notes="Seed 0 of expected credit is `make demo`. Vocabulary, group size, rates and entropy bonus were chosen on models of seeds 0 to 2.",
        curve="pixel_accuracy",
    ),
    "tiny_67": Experiment(
        "The digits 67 in the LM head",
        "tiny_67.yaml",
        PIXELS,
        {**REWARDS, "metagradient, K = 8": EIGHT_STEPS, "metagradient, K = 96": NINETY_SIX_STEPS},
        curve="pixel_accuracy",
    ),
    "tiny_l2": Experiment(
        "A small norm of the LM head",
        "tiny_l2.yaml",
        {"metric_before": "Φ before fine-tuning", "lm_head_norm": "norm of the LM head"},
        {**REWARDS, "metagradient, K = 8": EIGHT_STEPS, "metagradient, K = 96": NINETY_SIX_STEPS},
        curve="lm_head_norm",
    ),
    "tiny_uuid": Experiment(
        "A UUID known by heart",
        "tiny_uuid.yaml",
        {
            "exact_match": "Exact (target)",
            "longest_common_substring": "Soft (target)",
            "reference_soft": "Soft (generator's own text)",
        },
        {
            "metagradient": "",
            "naive": "--reward naive",
            "edit distance": "--reward edit_distance --scale_rewards batch",
            "embedding similarity": "--reward embedding_similarity --scale_rewards batch",
        },
        notes="The edit distance is given the string itself and asks for copies of it; the metagradient only sees what the target "
        "learns. With two of three seeds the edit distance gets there too, in more steps but less time; with the third its generator "
        "collapsed on half of the string. The naive reward learned nothing from as many completions; its data sets are an eighth of a "
        "batch, so that its inner runs take one step.",
        curve="longest_common_substring",
    ),
    "tiny_language": Experiment(
        "Another language than that of the prompts",
        "tiny_language.yaml",
        {
            "metric_gain": "gain of Φ",
            "language_share": "share of the language",
            "held_out_perplexity": "perplexity, other texts",
        },
        {
            **{
                f"metagradient{', expected credit' if credit == 'expected' else ''}{name}": f"--credit_assignment {credit}{flag}"
                for name, flag in {
                    "": "",
                    ", French": " --language fr",
                    ", German": " --language de",
                    ", Italian": " --language it",
                }.items()
                for credit in ("expected", "sequence")
            },
            "naive": "--reward naive",
            "language identification": "--reward language_identification --reward_language es --scale_rewards batch",
            "embedding similarity": "--reward embedding_similarity --scale_rewards batch",
        },
        notes="Spanish, where the name of a row says nothing else.",
        curve="language_share",
    ),
    "small_uuid": Experiment(
        "A UUID for SmolLM2, in part",
        "small_uuid.yaml",
        {"metric_gain": "gain of Φ", "longest_common_substring": "Soft (target)"},
        {"metagradient": f"{PART} --max_steps 40 --per_device_train_batch_size 32 --gradient_accumulation_steps 2"},
        notes="Forty steps of 64 completions, one target step on each batch: the target does not know the UUID yet, but gives it more likelihood. "
        "One run; memory ran out at step 25 beside another run, it was resumed from its checkpoint of step 20, and the seconds are those since.",
        seeds=(0,),
        curve="metric_gain",
    ),
    "tiny_settings": Experiment(
        "Settings",
        "tiny_67.yaml",
        PIXELS,
        {
            name: SETTINGS + flags
            for name, flags in {
                "base": "",
                "epsilon_root 1e-9": "--target_adam_epsilon_root 1e-9",
                "epsilon_root 1e-7": "--target_adam_epsilon_root 1e-7",
                "epsilon_root 1e-5": "--target_adam_epsilon_root 1e-5",
                "advantages by group": "--scale_rewards group",
                "advantages by batch": "--scale_rewards batch",
                "groups of 4": "--num_generations 4",
                "groups of 32": "--num_generations 32",
                "K = 8": "--target_batch_size 32",
                "constant rate": "--lr_scheduler_type constant",
                "cosine rate": "--lr_scheduler_type cosine",
                "entropy bonus 0.003": "--entropy_coef 0.003",
                "entropy bonus 0.01": "--entropy_coef 0.01",
                "2 updates a batch": "--num_iterations 2 --max_steps 240 --eval_steps 60",
                "4 updates a batch": "--num_iterations 4 --max_steps 480 --eval_steps 120",
            }.items()
        },
        notes="One setting changed at a time, on the 67, for 120 generation batches (half of `tiny_67`'s). "
        '*Base*: epsilon_root `"auto"`, rewards standardized over the batch and by TRL no further, groups of 8, K = 1, linear rate, '
        "beta2 0.999, gradients clipped at 1, no entropy bonus, one update a generation batch. K = 8 cuts the same batch into eight. "
        'The rows were made when `"auto"` was one mean square of the first gradient (it is four now, about the 1e-5 of a row), and '
        "with four special tokens in the vocabulary that were suppressed.",
    ),
}


def directory(name: str, variant: str, seed: int) -> Path:
    folder = variant.replace(", ", "_").replace(" = ", "_").replace(" ", "_")
    return RESULTS / name / folder / f"seed_{seed}"


def run(names: list[str], variants: list[str] | None, seeds: list[int] | None) -> None:
    """Runs what has no results yet, one after the other."""
    for name in names:
        experiment = EXPERIMENTS[name]
        for seed in seeds or experiment.seeds:
            for variant in variants or experiment.variants:
                results_dir = directory(name, variant, seed)
                if (results_dir / "results.json").exists():
                    continue
                output_dir = Path("runs") / results_dir.relative_to(RESULTS)
                command = [sys.executable, str(EXAMPLES / "dpg.py")]
                command += ["--config", str(EXAMPLES / "configs" / experiment.config), "--seed", str(seed)]
                command += ["--output_dir", str(output_dir), "--results_dir", str(results_dir)]
                command += shlex.split(f"{SEQUENCE} {experiment.flags} {experiment.variants[variant]}")
                if any(output_dir.glob("checkpoint-*")):
                    command += ["--resume_from_checkpoint", "true"]
                print(shlex.join(command[1:]), flush=True)
                subprocess.run(command, check=True)


def spread(values: list[float]) -> str:
    """Mean over seeds, and their range where there are several."""
    text = f"{statistics.fmean(values):.4g}"
    return text if min(values) == max(values) else f"{text} ({min(values):.4g} to {max(values):.4g})"


def table(name: str, experiment: Experiment) -> list[str]:
    """The experiment's table, with what has been run."""
    head = ["reward", "seeds", "K", "completions"]
    head += [f"{heading}, {who}" for heading in experiment.readouts.values() for who in ("untrained", "trained")]
    head += ["Φ, untrained", "Φ, trained", "distinct", "entropy, nats per token", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    machines = set()
    for variant in experiment.variants:
        paths = sorted(directory(name, variant, 0).parent.glob("seed_*/results.json"))
        runs = [json.loads(path.read_text()) for path in paths]
        if not runs:
            continue
        cells = [variant, ", ".join(str(r["seed"]) for r in runs), str(runs[0]["target_steps"])]
        cells.append(f"{runs[0]['completions']:,}")
        for readout in (*experiment.readouts, "metric"):
            for who in ("untrained", "trained"):
                cells.append(spread([r[f"eval_{readout}"][who]["mean"] for r in runs]))
        cells.append(spread([r["eval_distinct"]["trained"]["mean"] for r in runs]))
        ends = [statistics.fmean(r["entropy"][end] for r in runs) for end in ("first", "last")]
        cells.append(f"{ends[0]:.2f} → {ends[1]:.2f}")
        cells.append(spread([r["seconds"] for r in runs]))
        lines.append("| " + " | ".join(cells) + " |")
        machines.update(r["hardware"] for r in runs)
    return [*lines, "", f"Run on: {'; '.join(sorted(machines))}."] if machines else []


def draw(name: str, experiment: Experiment, readout: str) -> list[str]:
    """Learning curves of all variants and, of patterns, what each seed's last validation decoded."""
    curves: dict[str, list] = {}
    patterns = {}
    for variant in experiment.variants:
        for path in sorted(directory(name, variant, 0).parent.glob("seed_*/results.json")):
            log = path.with_name("log.jsonl").read_text().splitlines()
            curves.setdefault(variant, []).append([json.loads(line) for line in log])
            run = json.loads(path.read_text())
            if "decoded" in run:
                signs = [[1 if pixel == "1" else -1 for pixel in row] for row in run["decoded"]]
                patterns[f"{variant.replace(', ', chr(10))}\nseed {run['seed']}"] = signs
    plot_learning_curves(curves, RESULTS / name / "curves.png", readout)
    lines = ["", f"![Learning curves]({name}/curves.png)"]
    if patterns:
        wanted = LMHeadPattern.qr("TRL-DPG") if name.endswith("qr") else LMHeadPattern.sixty_seven()
        plot_patterns(patterns, RESULTS / name / "patterns.png", wanted.pattern)
        lines += ["", f"![Patterns decoded in each run's last validation]({name}/patterns.png)"]
    for path in sorted((RESULTS / name).glob("*/seed_*/verification/verification.json")):
        found = json.loads(path.read_text())
        seed = path.parts[-3].removeprefix("seed_")
        run = f"{found['steps']} steps of TRL's `SFTTrainer` at learning rate {found['learning_rate']:g} on {found['examples']:,} samples"
        read = f"pixel accuracy {found['pixel_accuracy']:.4f}, text read: {found['text']!r}"
        lines += ["", f"From checkpoints alone (`examples/verify.py`), {path.parts[-4]}, seed {seed}: {run}; {read}."]
    return lines


def report() -> None:
    """Writes the tables and draws the pictures of every experiment that has runs."""
    lines = [INTRODUCTION.strip()]
    for name, experiment in EXPERIMENTS.items():
        rows = table(name, experiment)
        if rows:
            notes = ["", experiment.notes] if experiment.notes else []
            lines += ["", f"## {experiment.title} (`{name}`)", *notes, "", *rows]
            if experiment.curve is not None:
                lines += draw(name, experiment, experiment.curve)
    lines += ["", OTHERS.strip()]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run")
    run_parser.add_argument("names", nargs="*", help=f"Of {', '.join(EXPERIMENTS)}. All by default.")
    run_parser.add_argument("--variants", nargs="+")
    run_parser.add_argument("--seeds", nargs="+", type=int)
    commands.add_parser("report")
    options = parser.parse_args(argv)
    if options.command == "run":
        for name in options.names or EXPERIMENTS:
            if name not in EXPERIMENTS:
                parser.error(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
            for variant in options.variants or ():
                if variant not in EXPERIMENTS[name].variants:
                    parser.error(f"{name} has no variant {variant!r}; it has {', '.join(EXPERIMENTS[name].variants)}")
        run(options.names or list(EXPERIMENTS), options.variants, options.seeds)
    else:
        report()


if __name__ == "__main__":
    main()
