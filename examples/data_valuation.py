"""
Ranks Wikipedia leads by metagradient, half of them damaged, and tests the ranking by ordinary fine-tuning.

    python -m examples.data_valuation --output runs/data_valuation

Writes the files of `trl-dpg value`, and `results.md`. This table says which half is best to fine-tune on, judged by leads that no
ranking saw. The ranking does not know which leads are damaged.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig

from experiments.corpora import damaged_leads, smollm2
from experiments.halves import likelihoods, table_of_halves, table_of_rankings
from trl_dpg.data import dataset_examples
from trl_dpg.metagradients import TargetTrainingArguments
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.scripts.value import describe, summarize, value_examples, write_valuation
from trl_dpg.target import load_target_model, load_target_tokenizer


def main(output: str, num_examples: int, num_draws: int, num_runs: int, learning_rate=5e-4, batch_size=64) -> None:
    """Writes the ranking of `num_examples` leads over `num_draws` orders, and what `num_runs` fine-tuning runs of each half say of it."""
    folder, leads, name = Path(output), damaged_leads(num_examples, num_metric=24, num_test=48), smollm2()
    tokenizer = load_target_tokenizer(name)
    torch.manual_seed(0)  # the adapter's first weights
    model = load_target_model(name, peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    examples = dataset_examples(leads["train"].select_columns("text"), tokenizer)
    metric, test = (LanguageModelingLikelihood(leads[s], tokenizer, 16, max_length=48) for s in ("metric", "test"))
    sizes = {"batch_size": batch_size, "micro_batch_size": 16, "max_length": 48}
    recipe = TargetTrainingArguments(learning_rate=learning_rate, **sizes)
    if not (folder / "valuation.json").exists():  # an hour is not spent twice
        valuation = value_examples(model, examples, metric, recipe, num_draws)
        summary = summarize(valuation, model, metric, "Wikipedia leads, half of them damaged")
        write_valuation(folder, leads["train"], valuation, summary, tokenizer)
    summary = json.loads((folder / "valuation.json").read_text(encoding="utf-8"))
    print(describe(summary, output), flush=True)
    scores = load_dataset("parquet", data_files=str(folder / "scores.parquet"), split="train").sort("index")["score"]
    rankings = {"metagradient": list(scores), "lowest loss": likelihoods(model, examples, 48)}
    other_orders = replace(recipe, seed=num_draws)  # none that the ranking saw
    halves = table_of_halves(model, examples, rankings, test.__call__, other_orders, num_runs)
    results = f"{halves}\n\n{table_of_rankings(rankings, leads['train']['kind'])}\n\n{describe(summary, output)}\n"
    (folder / "results.md").write_text(results, encoding="utf-8")
    print(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/data_valuation", help="Folder to write.")
    parser.add_argument("--num_examples", type=int, default=512, help="Leads to rank.")
    parser.add_argument("--num_draws", type=int, default=5, help="Orders to average the ranking over.")
    parser.add_argument("--num_runs", type=int, default=3, help="Fine-tuning runs of each half.")
    main(**vars(parser.parse_args()))
