"""
Alternates generator and target: train the generator, fine-tune the target on what it writes, keep that target, and again.

    python examples/closed_loop.py --config examples/configs/tiny_l2.yaml --max_steps 60 --rounds 8 --output_dir runs/closed_loop

Whether the metric then rises steadily or collapses is a question that the paper leaves open. Beside it runs a target that is
fine-tuned as often on the untrained generator's text. The metric must mean the same for every target (a norm, a likelihood):
patterns are refused, as they are changes since the last round. `max_steps` is that of one round. Written to `results_dir`:
`results.json`, `results.md`, `rounds.png`.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from dpg import DPGScriptArguments, load_prompts, make_metric, resolve_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig
from verify import fine_tune

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer, untie_lm_head
from trl_dpg.scripts.common import Parser


@dataclass
class ClosedLoopArguments:
    """Arguments of the alternation."""

    rounds: int = field(default=8, metadata={"help": "How often generator and target take turns."})
    sft_steps: int = field(default=4, metadata={"help": "Optimizer steps that the target keeps of each round."})


@torch.no_grad()
def read(metric, target) -> dict[str, float]:
    """The metric and its read-outs of a target as it is."""
    target.eval()
    metric.setup(target)
    return {"metric": metric(target).item(), **metric.readouts(target)}


def main(
    loop_args: ClosedLoopArguments,
    script_args: DPGScriptArguments,
    training_args: DatasetPolicyGradientConfig,
    model_args: ModelConfig,
) -> None:
    if script_args.metric in ("67", "qr"):
        raise ValueError(
            f"`metric` is {script_args.metric!r}, a change since the last round. Choose one that is the model's own, such as "
            "'lm_head_norm'."
        )
    training_args.eval_strategy, training_args.load_best_model_at_end, training_args.save_strategy = "no", False, "no"
    generator_name = resolve_model(model_args.model_name_or_path, script_args, training_args)
    target_name = resolve_model(script_args.target_model_name_or_path, script_args, training_args)
    generator = AutoModelForCausalLM.from_pretrained(generator_name, dtype=torch.float32)
    target = AutoModelForCausalLM.from_pretrained(target_name, dtype=torch.float32)
    untie_lm_head(target)
    control = copy.deepcopy(target)
    tokenizer, target_tokenizer = (AutoTokenizer.from_pretrained(name) for name in (generator_name, target_name))
    prompts = load_prompts(script_args)
    metric, *_ = make_metric(script_args)

    rows = [{"round": 0, "loop": read(metric, target), "control": read(metric, control)}]
    for number in range(1, loop_args.rounds + 1):
        trainer = DatasetPolicyGradientTrainer(
            model=generator,
            target_model=copy.deepcopy(target),
            metric=metric,
            args=training_args,
            train_dataset=prompts["train"],
            eval_dataset=prompts["test"],
            processing_class=tokenizer,
            target_processing_class=target_tokenizer,
        )
        if number == 1:
            untrained = [trainer.predict(prompts["test"]).predictions for _ in range(loop_args.rounds)]
        trainer.train()
        entropies = [
            row["entropy"] for row in trainer.state.log_history if "entropy" in row
        ]  # none in a run that logs none
        written = trainer.predict(prompts["test"]).predictions
        recipe = training_args.target_learning_rate, len(written) // loop_args.sft_steps, training_args.seed
        target = fine_tune(target, target_tokenizer, written, *recipe)
        control = fine_tune(control, target_tokenizer, untrained[number - 1], *recipe)
        rows.append(
            {"round": number, "loop": read(metric, target), "control": read(metric, control)}
            | {"entropy": entropies[-1] if entropies else None, "distinct": len(set(written)) / len(written)}
        )
        print(json.dumps(rows[-1]), flush=True)

    results_dir = Path(script_args.results_dir or training_args.output_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    (results_dir / "results.json").write_text(
        json.dumps({"seed": training_args.seed, "rounds": rows}, indent=2) + "\n"
    )
    readouts = list(rows[0]["loop"])
    head = ["round", *(f"{name}, {who}" for name in readouts for who in ("loop", "control")), "entropy", "distinct"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row["round"])] + [f"{row[who][name]:.6g}" for name in readouts for who in ("loop", "control")]
        cells += [f"{row[name]:.3g}" if name in row else "" for name in ("entropy", "distinct")]
        lines.append("| " + " | ".join(cells) + " |")
    (results_dir / "results.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for who, label in (("loop", "generator trained every round"), ("control", "untrained generator")):
        axes.plot([row["round"] for row in rows], [row[who]["metric"] for row in rows], marker="o", label=label)
    axes.set_xlabel("round")
    axes.set_ylabel("metric of the target kept")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(results_dir / "rounds.png", dpi=150)
    print("\n".join(lines))


if __name__ == "__main__":
    parser = Parser((ClosedLoopArguments, DPGScriptArguments, DatasetPolicyGradientConfig, ModelConfig))
    main(*parser.parse_args_and_config())
