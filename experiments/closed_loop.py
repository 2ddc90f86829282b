"""
Trains generator and target in turns. Each round trains the generator, fine-tunes the target on its texts, and keeps this target.

    python -m experiments.closed_loop --config examples/configs/tiny_l2.yaml --max_steps 60 --rounds 8 --output_dir runs/closed_loop

The paper does not say whether the metric then rises steadily or collapses. For comparison, another target is fine-tuned as often on
texts of the untrained generator. With `--real_texts`, a third is fine-tuned on as many texts of a file, cut to as many tokens. The
metric must mean the same for every target, as a norm or a likelihood does. Patterns are refused, because they are changes since the
last round. `max_steps` is that of one round. Results are `results.json`, `results.md` and `rounds.png` in `output_dir`. Each round
writes them anew.
"""

import argparse
import copy
import json
from itertools import cycle, islice
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import Dataset, load_dataset

from experiments.common import read, sft
from trl_dpg.publishing.outcome import markdown_table
from trl_dpg.scripts.train import load_datasets, make_trainer, parse
from trl_dpg.target import load_target_model, load_target_tokenizer


def alternate(arguments: list, rounds: int, sft_steps: int, real_texts: str | None = None) -> None:
    """
    Writes the results of each round when the round ends. `arguments` are those of `trl-dpg train`. Between rounds, the models are in
    `output_dir`.

    `real_texts` is a JSON Lines file with a column `text`. It is read again from its start when all texts were used.
    """
    script_args, training_args, model_args, mixture = arguments
    training_args.eval_strategy, training_args.load_best_model_at_end, training_args.save_strategy = "no", False, "no"
    training_args.eval_on_start = False
    _, *prompts = load_datasets(script_args, training_args, mixture)
    metric, tokenizer = script_args.load_metric(), load_target_tokenizer(script_args.target_model_name_or_path)
    target = load_target_model(script_args.target_model_name_or_path, untie_head=True)
    kept_of = {"loop": target, "control": copy.deepcopy(target)}
    if real_texts is not None:
        kept_of["real"] = copy.deepcopy(target)
        real = cycle(load_dataset("json", data_files=real_texts, split="train")["text"][:])
    kept = {name: str(Path(training_args.output_dir) / name) for name in ("generator", "target")}

    rows: list[dict] = [{"round": 0, **{who: read(metric, model) for who, model in kept_of.items()}}]
    for number in range(1, rounds + 1):
        kept_of["loop"].save_pretrained(kept["target"])
        tokenizer.save_pretrained(kept["target"])
        script_args.target_model_name_or_path = kept["target"]
        trainer = make_trainer(script_args, training_args, model_args, prompts)
        if number == 1:
            untrained = [trainer.predict(prompts[1]).predictions for _ in range(rounds)]
        trainer.train()
        trainer.save_model(kept["generator"])
        model_args.model_name_or_path = kept["generator"]
        # none in a run that logs none
        entropies = [row["entropy"] for row in trainer.state.log_history if "entropy" in row]
        written = trainer.predict(prompts[1]).predictions
        texts = {"loop": written, "control": untrained[number - 1]}
        if real_texts is not None:
            texts["real"] = list(islice(real, len(written)))
        recipe = {
            "learning_rate": training_args.target_learning_rate,
            "per_device_train_batch_size": len(written) // sft_steps,
            "seed": training_args.seed,
            "max_length": training_args.max_completion_length + 2,  # BOS and EOS
        }
        for who, model in kept_of.items():
            kept_of[who] = sft(model, tokenizer, Dataset.from_dict({"text": texts[who]}), **recipe)
        rows.append(
            {"round": number, **{who: read(metric, model) for who, model in kept_of.items()}}
            | {"entropy": entropies[-1] if entropies else None, "distinct": len(set(written)) / len(written)}
        )
        write_results(rows, training_args.seed, Path(training_args.output_dir))
        print(json.dumps(rows[-1]), flush=True)


def write_results(rows: list[dict], seed: int, folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps({"seed": seed, "rounds": rows}, indent=2) + "\n")
    readouts = list(rows[0]["loop"])
    curves = {"loop": "generator trained every round", "control": "untrained generator", "real": "real texts"}
    curves = {who: label for who, label in curves.items() if who in rows[0]}
    sides = [(name, who) for name in readouts for who in curves]
    table = [["round", *(f"{name}, {who}" for name, who in sides), "entropy", "distinct"]]
    for row in rows:
        cells = [str(row["round"])] + [f"{row[who][name]:.6g}" for name, who in sides]
        shown = (row.get(name) for name in ("entropy", "distinct"))
        table.append(cells + ["" if value is None else f"{value:.3g}" for value in shown])
    (folder / "results.md").write_text(markdown_table(table) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for who, label in curves.items():
        axes.plot([row["round"] for row in rows], [row[who]["metric"] for row in rows], marker="o", label=label)
    axes.set(xlabel="round", ylabel="metric of the target kept")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / "rounds.png", dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="How often generator and target take turns.")
    parser.add_argument(
        "--sft_steps", type=int, default=4, help="Optimizer steps that the target keeps of each round."
    )
    parser.add_argument("--real_texts", help="JSON Lines with a column `text`, to compare with.")
    options, rest = parser.parse_known_args(argv)
    arguments, _ = parse(rest)
    script_args, training_args, *_ = arguments
    if script_args.metric in ("67", "qr"):
        raise ValueError(
            f"`metric` is {script_args.metric!r}, a change since the last round. Choose one that is the model's own, such as "
            "'lm_head_norm'."
        )
    alternate(arguments, options.rounds, options.sft_steps, options.real_texts)
    print((Path(training_args.output_dir) / "results.md").read_text())


if __name__ == "__main__":
    main()
