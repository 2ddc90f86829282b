"""
Runs the experiments of `experiments/tables.yaml` by `trl-dpg train`, and writes `experiments/results/README.md` from what they logged.

    python -m experiments.tables run tiny_67 --variants metagradient naive --seeds 0 1 2
    python -m experiments.tables report

A run that has its `results.json` is not repeated. A run that has a checkpoint goes on from it. So a command that was stopped can be repeated. `run`
without names runs everything.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from experiments.corpora import likelihood_texts
from experiments.prepare import prepare
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.publishing.outcome import markdown_table, validation_rows
from trl_dpg.reporting.callback import read_rows
from trl_dpg.reporting.plotting import plot_learning_curves, plot_patterns


RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
CONTENTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
EXPERIMENTS: dict[str, dict[str, Any]] = CONTENTS["experiments"]
SEQUENCE = "--credit_assignment sequence"  # as in the paper, unless a variant says otherwise


def directory(name: str, variant: str, seed: int) -> Path:
    folder = variant.replace(", ", "_").replace(" = ", "_").replace(" ", "_")
    return RESULTS / name / folder / f"seed_{seed}"


def run(names: list[str], variants: list[str] | None, seeds: list[int] | None) -> None:
    """Makes the runs that have no results yet, one after the other."""
    for name in names:
        for seed in seeds or EXPERIMENTS[name].get("seeds", (0, 1, 2)):
            for variant in variants or EXPERIMENTS[name]["variants"]:
                results = directory(name, variant, seed)
                if (results / "results.json").exists():
                    continue
                output_dir = Path("runs") / results.relative_to(RESULTS)
                command = [sys.executable, "-m", "trl_dpg.scripts.train", *flags(name, variant, seed)]
                command += ["--output_dir", str(output_dir)]
                if any(output_dir.glob("checkpoint-*")):
                    command += ["--resume_from_checkpoint", "true"]
                print(shlex.join(command[1:]), flush=True)
                start = time.perf_counter()
                subprocess.run(command, check=True)
                collect(output_dir, results, round(time.perf_counter() - start))


def flags(name: str, variant: str, seed: int) -> list[str]:
    """A run's flags. Writes the files in `data` that they name, if they are missing."""
    experiment = EXPERIMENTS[name]
    given = experiment["variants"][variant]
    kind, given = given if isinstance(given, list) else (experiment["data"], given)
    prepare(kind)  # what does not depend on the seed is read from here
    folder = prepare(kind, seed)
    text = f"--config {CONFIGS}/{experiment.get('config', name)}.yaml --seed {seed} {SEQUENCE} "
    text += f"--model_name_or_path {folder}/generator --target_model_name_or_path {folder}/target "
    text += f"--dataset_name {folder}/prompts.jsonl --eval_dataset_name {folder}/held_out.jsonl "
    words = shlex.split(f"{text} {experiment.get('flags', '')} {given}")
    if "{spanish}" in words:
        words[words.index("{spanish}") :] = likelihood_texts("es", 32, 32)["metric"]["text"]
    return words


def collect(output_dir: Path, folder: Path, seconds: int) -> None:
    """Writes a summary of a run's report into the folder of its results."""
    report = output_dir / "report"
    run, log = json.loads((report / "run.json").read_text()), read_rows(report / "log.jsonl")
    settings, training, validation = run["settings"], run["training"], run["validation"]["eval"]
    batches = training["steps"] * settings.get("gradient_accumulation_steps", 1)
    batches //= settings["steps_per_generation"] * settings.get("num_iterations", 1)
    entropies = [row["entropy"] for row in log if "entropy" in row]
    results = {
        "generator": run["base_model"]["name"],
        "target": run["target"]["name"],
        "target_steps": run["recipe"]["steps"],
        "completions_per_generation_batch": training["completions_per_generation_batch"],
        "completions": batches * training["completions_per_generation_batch"],
        "seed": training["seed"],
        "steps": training["steps"],
        # nats per token; a run shorter than `logging_steps` logs none
        "entropy": {"first": entropies[0], "last": entropies[-1]} if entropies else None,
        "seconds": seconds,
        "hardware": run["hardware"],
    }
    patterns = read_rows(report / "patterns.jsonl")
    if patterns:
        results["decoded"] = patterns[-1]["decoded"]
    end = ["train_runtime" in row for row in log].index(True)
    draws = {"untrained": [row for row in log if row["step"] == 0], "trained": log[end:]}
    for name in validation["after"]["mean"]:
        for who, side in (("untrained", "before"), ("trained", "after")):
            figures = {figure: validation[side][figure].get(name) for figure in ("mean", "standard_error")}
            figures["draws"] = [row[f"eval_{name}"] for row in draws[who] if f"eval_{name}" in row]
            results.setdefault(f"eval_{name}", {})[who] = figures
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "results.md").write_text(markdown_table(validation_rows(validation)) + "\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(rounded(row)) + "\n" for row in log))
    shutil.copy(report / "curve.png", folder)
    if patterns:
        shutil.copy(max(report.glob("patterns/step-*.png")), folder / "pattern.png")


def rounded(row: dict) -> dict:
    """A row of the log with five significant digits."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def spread(values: list[float]) -> str:
    """Mean over seeds, and the range if values differ."""
    text = f"{statistics.fmean(values):.4g}"
    return text if min(values) == max(values) else f"{text} ({min(values):.4g} to {max(values):.4g})"


def runs_of(name: str) -> dict[str, list[tuple[Path, dict]]]:
    """The runs of each variant that has any, seed by seed: the path and the content of `results.json`."""
    paths = {
        v: sorted(directory(name, v, 0).parent.glob("seed_*/results.json")) for v in EXPERIMENTS[name]["variants"]
    }
    return {v: [(path, json.loads(path.read_text())) for path in found] for v, found in paths.items() if found}


def table(name: str) -> list[str]:
    """The experiment's table, with the runs that exist."""
    readouts = EXPERIMENTS[name]["readouts"]
    head = ["reward", "seeds", "K", "completions"]
    head += [f"{heading}, {who}" for heading in readouts.values() for who in ("untrained", "trained")]
    rows = [[*head, "Φ, untrained", "Φ, trained", "distinct", "entropy, nats per token", "seconds"]]
    machines = set()
    for variant, found in runs_of(name).items():
        runs = [run for _, run in found]
        cells = [variant, ", ".join(str(r["seed"]) for r in runs), str(runs[0]["target_steps"])]
        cells.append(f"{runs[0]['completions']:,}")
        for readout in (*readouts, "metric"):
            for who in ("untrained", "trained"):
                cells.append(spread([r[f"eval_{readout}"][who]["mean"] for r in runs]))
        cells.append(spread([r["eval_distinct"]["trained"]["mean"] for r in runs]))
        ends = [statistics.fmean(r["entropy"][end] for r in runs) for end in ("first", "last")]
        rows.append([*cells, f"{ends[0]:.2f} → {ends[1]:.2f}", spread([r["seconds"] for r in runs])])
        machines.update(r["hardware"] for r in runs)
    return [markdown_table(rows), "", f"Run on: {'; '.join(sorted(machines))}."] if machines else []


def draw(name: str) -> list[str]:
    """Draws learning curves of all variants, and the patterns that last validations decoded. Adds a table of verifications."""
    curves: dict[str, list] = {}
    patterns = {}
    for variant, found in runs_of(name).items():
        curves[variant] = [read_rows(path.with_name("log.jsonl")) for path, _ in found]
        for run in [run for _, run in found if "decoded" in run]:
            signs = [[1 if pixel == "1" else -1 for pixel in row] for row in run["decoded"]]
            patterns[f"{variant.replace(', ', chr(10))}\nseed {run['seed']}"] = signs
    plot_learning_curves(curves, RESULTS / name / "curves.png", EXPERIMENTS[name]["curve"])
    lines = ["", f"![Learning curves]({name}/curves.png)"]
    if patterns:
        wanted = LMHeadPattern.qr("TRL-DPG") if name.endswith("qr") else LMHeadPattern.sixty_seven()
        plot_patterns(patterns, RESULTS / name / "patterns.png", wanted.pattern)
        lines += ["", f"![Patterns decoded in each run's last validation]({name}/patterns.png)"]
    rows = [["run", "seed", "steps", "learning rate", "texts", "pixel accuracy", "text read"]]
    for path in sorted((RESULTS / name).glob("*/seed_*/verification/verification.json")):
        found = json.loads(path.read_text())
        found |= found.get("data", {})  # as `trl-dpg verify` writes it
        run, seed = path.parts[-4].replace("_", " "), path.parts[-3].removeprefix("seed_")
        figures = f"{found['learning_rate']:g}", f"{found['examples']:,}", f"{found['pixel_accuracy']:.4f}"
        rows.append([run, seed, str(found["steps"]), *figures, found["text"] or "none"])
    if len(rows) > 1:
        lines += ["", "Verifications, from checkpoints alone by TRL's `SFTTrainer`:", "", markdown_table(rows)]
    return lines


def report() -> None:
    """Writes the tables and draws the pictures of every experiment that has runs."""
    lines = [CONTENTS["introduction"].strip()]
    for name, experiment in EXPERIMENTS.items():
        rows = table(name)
        if rows:
            notes = ["", experiment["notes"]] if "notes" in experiment else []
            lines += ["", f"## {experiment['title']} (`{name}`)", *notes, "", *rows]
            lines += draw(name) if "curve" in experiment else []
    lines += ["", CONTENTS["others"].strip()]
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
    if options.command == "report":
        return report()
    for name in options.names or EXPERIMENTS:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
        for variant in options.variants or ():
            if variant not in EXPERIMENTS[name]["variants"]:
                parser.error(f"{name} has no variant {variant!r}; it has {', '.join(EXPERIMENTS[name]['variants'])}")
    run(options.names or list(EXPERIMENTS), options.variants, options.seeds)


if __name__ == "__main__":
    main()
