"""The outcome of a run in words and figures, for cards, reports and curves."""

import math
from collections.abc import Iterable
from typing import Any


# Headings of read-outs. Any other read-out is shown under its own name, with spaces for underscores.
HEADINGS = {
    "qr_decoded": "QR code read (share of draws)",
    "lm_head_norm": "norm of the LM head",
    "exact_match": "exact recall",
    "longest_common_substring": "longest common substring (share of the text)",
    "held_out_perplexity": "perplexity of other texts",
    "language_share": "share of texts in the language",
    "language_probability": "probability of the language",
    "reference_exact": "generated texts that hold the text itself (share)",
    "reference_soft": "longest common substring of generated texts with the text (share)",
    "metric": "Φ",
    "metric_gain": "Φ, gain over the target before fine-tuning",
    "distinct": "distinct texts (share)",
    "completion_length": "length of the texts (tokens)",
    "target_steps": "optimizer steps of the target",
}
_LAST = ["metric", "metric_gain", "distinct", "completion_length", "target_steps"]
_MAIN = ["pixel_accuracy", "exact_match", "held_out_perplexity"]
_SHARES = {"pixel_accuracy", "qr_decoded", "exact_match"}
_NOT_SHOWN = {"metric_before", "target_loss", "empty", "distinct_share"}


def heading(name: str) -> str:
    """The heading of a read-out, for a person to read."""
    return HEADINGS.get(name, name.replace("_", " "))


def shown(names: Iterable[str]) -> list[str]:
    """Sorts read-outs into the order in which they are shown: those of the metric come first."""
    names = [name for name in names if name not in _NOT_SHOWN]
    return [*(name for name in names if name not in _LAST), *(name for name in _LAST if name in names)]


def split_of(prefix: str) -> str:
    """The name of a validation set, which is empty if there is only one."""
    return prefix.removeprefix("eval").strip("_")


def main_readout(facts: dict[str, Any]) -> str:
    """
    The read-out that a run's curve shows and its card begins with. It is a well-known one if the metric has it, or else the metric's
    first. If nothing was validated yet, it is `"metric_gain"`. `facts` come from [`~trl_dpg.publishing.training_facts`].
    """
    for validation in facts["validation"].values():
        names = [name for name in shown(validation["after"]["mean"]) if name not in _LAST]
        return next((name for name in [*_MAIN, *names] if name in names), "metric_gain")
    return "metric_gain"


def outcome(facts: dict[str, Any]) -> str:
    """
    Says whether validation shows that the goal of training was reached, and compares with the untrained generator.

    A picture or a text counts as reached if every draw shows all of it. Any other goal is reached if the gain of Φ is above zero and
    above the gain before training. With several draws, it must be so by more than two standard errors. Conditions must hold in every
    draw.

    `facts` come from [`~trl_dpg.publishing.training_facts`]. Each validation set gets one sentence.
    """
    sentences = []
    for prefix, validation in facts["validation"].items():
        split = split_of(prefix)
        where = f"step {validation['after']['step']}{f' on {split}' if split else ''}"
        deciding = facts["metric"]["readouts"]  # if the last one is a share, it is the goal itself
        names = dict.fromkeys([*deciding, main_readout({"validation": {prefix: validation}})])
        figures = "; ".join(_figure(name, validation) for name in names)
        held = all(validation["after"]["mean"].get(name) == 1 for name in facts["metric"].get("conditions", ()))
        verdict = "reached" if held and _is_reached(deciding, validation) else "not reached"
        sentences.append(f"In validation at {where}, this was {verdict}: {figures}.")
    return " ".join(sentences) or "Whether this was reached is not known: the generator was not validated."


def _is_reached(deciding: list[str], validation: dict[str, Any]) -> bool:
    before, after = validation["before"], validation["after"]
    name = deciding[-1] if deciding[-1] in _SHARES else "metric_gain"
    value = after["mean"].get(name)
    if value is None or name in _SHARES:
        return value == 1
    error = after["standard_error"].get("metric_gain") or 0.0
    untrained = before["mean"].get("metric_gain") if before is not None else None
    if untrained is None:
        return value > 2 * error
    errors = math.hypot(error, before["standard_error"].get("metric_gain") or 0.0)
    return value > 2 * error and value - untrained > 2 * errors


def _figure(name: str, validation: dict[str, Any]) -> str:
    """Value of a read-out, with its values before training and by chance in parentheses."""
    before, after = validation["before"], validation["after"]
    beside = []
    if before is not None:
        who = "untrained generator" if before["step"] == 0 else f"generator at step {before['step']}"
        beside.append(f"{who}: {_value(name, before['mean'].get(name))}")
    if name == "pixel_accuracy":
        beside.append("chance: 50 %")
    label = "gain of Φ" if name == "metric_gain" else heading(name).removesuffix(" (share of draws)")
    return f"{label} {_value(name, after['mean'].get(name))}" + (f" ({', '.join(beside)})" if beside else "")


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    if name in _SHARES:
        return f"{math.floor(1000 * value + 1e-6) / 10:g} %"  # 2000 of 2001 pixels are 99.9 %
    return f"{value:.4g}"


def validation_rows(validation: dict[str, Any]) -> list[list[str]]:
    """Cells of a table, with its head as the first row. `validation` is a value of [`~trl_dpg.publishing.facts.summarize_validation`]."""
    sides = [side for side in (validation["before"], validation["after"]) if side is not None]
    heads = []
    for side in sides:
        who = "before training" if side["step"] == 0 else f"at step {side['step']}"
        heads.append(f"{who}, {side['draws']} draw{'s' if side['draws'] > 1 else ''}")
    rows = [["validation", *heads]]
    for name in shown(validation["after"]["mean"]):
        cells = []
        for side in sides:
            value, error = side["mean"].get(name), side["standard_error"].get(name)
            text = "not finite" if value is None else f"{value:.4g}"
            cells.append(f"{text} ± {error:.1g}" if error else text)
        rows.append([heading(name), *cells])
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table. The first row is its head."""
    head, *lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])


def recipe_text(recipe: dict[str, Any]) -> str:
    """The target's recipe in a line, from the `recipe` in [`~trl_dpg.publishing.training_facts`]."""
    steps = "one step" if recipe["steps"] == 1 else f"{recipe['steps']} steps"
    rule = {"adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}.get(recipe["optim"], recipe["optim"])
    parts = [
        f"{steps} of {rule}",
        f"{recipe['batch_size']} examples a step",
        f"{recipe['replay_ratio']:.0%} of them real" if recipe.get("replay_ratio") else "",  # older files lack it
        f"learning rate {recipe['learning_rate']:g} ({recipe['lr_scheduler_type'].replace('_', ' ')})",
        f"betas {recipe['adam_beta1']:g} and {recipe['adam_beta2']:g}" if rule == "AdamW" else "",
        f"momentum {recipe['momentum']:g}" if recipe.get("momentum") else "",
        f"weight decay {recipe['weight_decay']:g}" if recipe["weight_decay"] else "",
        f"gradients clipped to {recipe['max_grad_norm']:g}" if recipe["max_grad_norm"] else "",
        f"texts of up to {recipe['max_length']} tokens",
        "loss on completions alone" if recipe.get("completion_only_loss") else "",
        "loss on the assistant's messages alone" if recipe.get("assistant_only_loss") else "",
        "LM head untied from the input embedding" if recipe["untie_lm_head"] else "",
        f"rewards are means over {recipe['variants']} variants of this" if recipe.get("variants", 1) > 1 else "",
    ]
    return ", ".join(filter(None, parts))
