"""Tests of a ranking, in Markdown: which half is best to fine-tune on, and how well the ranking tells clean rows from damaged ones."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import torch

from trl_dpg.metagradients import TargetTrainingArguments
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.publishing.outcome import markdown_table
from trl_dpg.validation import validate


def likelihoods(model, examples: list[dict[str, Any]], max_length: int) -> list[float]:
    """Mean log-likelihood of each example under the model, in nats per token."""
    model.eval()
    with torch.no_grad():
        return [LanguageModelingLikelihood([example], max_length=max_length)(model).item() for example in examples]


def table_of_halves(
    model,
    examples: list[dict[str, Any]],
    rankings: dict[str, list[float]],
    test: Callable,
    recipe: TargetTrainingArguments,
    num_runs: int,
) -> str:
    """
    Fine-tunes with `torch.optim.AdamW` on halves of the examples, each in `num_runs` orders.

    `rankings` maps a ranking's name to its scores. Of the first ranking, the lower half is tested, too. `test` is the metric to judge by.
    """
    half, everything = len(examples) // 2, range(len(examples))
    ranked = {name: sorted(everything, key=scores.__getitem__, reverse=True) for name, scores in rankings.items()}
    chosen = {f"top half by {name}": [order[:half]] * num_runs for name, order in ranked.items()}
    chosen["random half"] = [random.Random(f"{recipe.seed}-{run}").sample(everything, half) for run in range(num_runs)]
    first = next(iter(ranked))
    chosen[f"bottom half by {first}"] = [ranked[first][half:]] * num_runs
    chosen["all, twice the steps"] = [list(everything)] * num_runs

    rows = [["fine-tuned on", "examples", "log-likelihood, nats per token", "gain", "perplexity"]]
    for label, of_runs in chosen.items():
        values = []
        for run, indices in enumerate(of_runs):
            of_run = replace(recipe, seed=recipe.seed + run)
            result = validate(model, [examples[i] for i in sorted(indices)], test, of_run)
            values.append(result["metric"])
        mean, before = fmean(values), result["metric_before"]
        error = f" ± {stdev(values) / math.sqrt(num_runs):.4f}" if num_runs > 1 else ""
        row = [label, len(indices), f"{mean:.4f}{error}", f"{mean - before:+.4f}", f"{math.exp(-mean):.2f}"]
        print(f"{label}: {row[3]}", flush=True)
        rows.append([str(cell) for cell in row])
    rows.insert(1, ["no fine-tuning", "0", f"{before:.4f}", "", f"{math.exp(-before):.2f}"])
    return markdown_table(rows)


def table_of_rankings(rankings: dict[str, list[float]], kinds: list[str]) -> str:
    """Share of clean rows in the upper half, and the AUC of clean rows against all damaged ones, and against each kind."""
    damages = sorted(set(kinds) - {"clean"})
    rows = [["ranking", "clean in upper half", "AUC", *(f"AUC, {kind}" for kind in damages)]]
    for name, scores in rankings.items():
        upper = sorted(range(len(kinds)), key=lambda i: -scores[i])[: len(kinds) // 2]
        share = fmean(kinds[i] == "clean" for i in upper)
        aucs = [auc(scores, kinds, against) for against in (damages, *([kind] for kind in damages))]
        rows.append([name, *(f"{value:.2f}" for value in (share, *aucs))])
    return markdown_table(rows)


def auc(scores: list[float], kinds: list[str], damages: list[str]) -> float:
    """Chance that a clean row scores higher than a damaged one (area under the ROC curve)."""
    clean, damaged = ([s for s, k in zip(scores, kinds, strict=True) if k in of] for of in (["clean"], damages))
    return fmean((a > b) + (a == b) / 2 for a in clean for b in damaged)
