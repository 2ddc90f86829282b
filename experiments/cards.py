"""
Writes the cards of the generators that the tiny experiments trained into `model_cards`, from the logs of their runs.

    python -m experiments.cards tiny_qr tiny_67 tiny_l2 tiny_uuid tiny_language

Each folder holds the files that `trainer.push_to_hub()` would put beside the model: the card, `dpg.json` and the pictures. Nothing is
trained. The models are only built so that their sizes are known.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import TrainerState

from experiments.prepare import prepare
from experiments.tables import CONFIGS, RESULTS
from trl_dpg.publishing.cards import generator_card
from trl_dpg.publishing.facts import FACTS_FILE, training_facts
from trl_dpg.publishing.outcome import main_readout
from trl_dpg.reporting.callback import read_rows
from trl_dpg.reporting.plotting import plot_learning_curve, plot_pattern
from trl_dpg.scripts.train import load_datasets, make_trainer, parse


CARDS = Path(__file__).parent.parent / "model_cards"

# What the metric alone does not tell: which texts become more likely
EFFECTS = {
    "tiny_qr": None,
    "tiny_67": None,
    "tiny_l2": None,
    "tiny_uuid": "it knows a UUID of 32 hexadecimal digits by heart",
    "tiny_language": "Spanish texts become more likely to it, although all prompts are English",
}


def write_card(name: str) -> Path:
    """The card of the metagradient run with seed 0 of an experiment, by expected credit where there is such a run."""
    results = RESULTS / name / "metagradient_expected_credit" / "seed_0"
    if not results.exists():
        results = RESULTS / name / "metagradient" / "seed_0"
    run, log = json.loads((results / "results.json").read_text()), read_rows(results / "log.jsonl")
    folder = CARDS / name
    folder.mkdir(parents=True, exist_ok=True)
    kind = Path(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["dataset_name"]).parent.name
    prepare(kind)
    with tempfile.TemporaryDirectory() as directory:
        arguments, _ = parse(f"--config {CONFIGS}/{name}.yaml --output_dir {directory} --use_cpu true".split())
        args = arguments[1]
        if run["steps"] != args.max_steps:
            print(f"{name}: the results are of {run['steps']} steps, not of {args.max_steps}: run it again.")
        _, *prompts = load_datasets(arguments[0], args, arguments[3])
        trainer = make_trainer(*arguments[:3], prompts)
        end = ["train_runtime" in row for row in log].index(True)
        in_training = [row for row in log[:end] if "eval_metric" in row]
        best = max(in_training, key=lambda row: row["eval_metric"])["step"]
        trainer.state = TrainerState(log_history=log, global_step=run["steps"], best_global_step=best)
        facts = training_facts(trainer)
    if "decoded" in run:
        trainer.metric.decoded = torch.tensor([[1 if pixel == "1" else -1 for pixel in row] for row in run["decoded"]])
    del facts["versions"]  # this environment's, not the run's
    facts["hardware"] = f"{run['hardware']}; {run['seconds']} seconds"
    facts["metric"]["effect"] = EFFECTS[name] or facts["metric"]["effect"]
    if name == "tiny_uuid":
        facts["metric"]["readouts"] = ["exact_match"]  # which says whether the effect is there
    facts["base_model"]["name"], facts["target"]["name"] = run["generator"], run["target"]
    verification = results / "verification" / "verification.json"
    if verification.exists():
        found = json.loads(verification.read_text())
        facts["verification"] = found | found.get("data", {})  # as `trl-dpg verify` writes it
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    plot_learning_curve(log, folder / "curve.png", main_readout(facts), facts["reward"])
    if trainer.metric.picture() is not None:
        plot_pattern(*trainer.metric.picture(), folder / "pattern.png")
    command = f"python -m experiments.prepare {kind} && trl-dpg train --config examples/configs/{name}.yaml"
    card = generator_card(
        facts,
        repo_id=f"runs/{name}",
        license="apache-2.0",
        pictures=[path.name for path in sorted(folder.glob("*.png"))],
        how_to_get=f"In this repository, `{command}` trains it and writes it to `runs/{name}`.",
    )
    card.save(folder / "README.md")
    return folder / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=EFFECTS)
    for name in parser.parse_args().names:
        print(write_card(name))


if __name__ == "__main__":
    main()
