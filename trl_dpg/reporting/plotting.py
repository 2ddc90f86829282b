"""Pictures of a run."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..metagradients.check import SHIFTS, MetagradientCheck
from ..publishing.facts import validation_names


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK, LIGHT, WRONG_DARK, WRONG_LIGHT, UNMOVED = "black", "white", "#a50f15", "#fcae91", "#969696"
DOTS: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5, "alpha": 0.7}
DPI = 150


def plot_learning_curve(
    log_history: Sequence[dict[str, Any]],
    path: str | PathLike[str],
    readout: str = "metric_gain",
    reward: str = "metagradient",
) -> "Figure":
    """
    Draws a read-out over training, with the standard deviation of the raw rewards below.

    Args:
        log_history (`Sequence[dict]`):
            `trainer.state.log_history`, with or without evaluations.
        path (`str` or `PathLike`):
            PNG file to write.
        readout (`str`, *optional*, defaults to `"metric_gain"`):
            The read-out to draw: `"metric_gain"` or the name of a read-out of the metric. A line shows its values on training
            batches. Dots show its values in validation, with a color for each validation set.
        reward (`str`, *optional*, defaults to `"metagradient"`):
            The reward of the run, `args.reward`. Only `"metagradient"` and `"naive"` have values on training batches.
    """
    figure = _figure(7, 5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.5])
    _plot(top, log_history, f"{reward}/{readout}", label="training batches", color="tab:blue")
    for number, name in enumerate(validation_names(log_history), start=1):
        of_set = f"on {name.removeprefix('eval_')}" if name != "eval" else "(held-out prompts, torch AdamW)"
        _plot(top, log_history, f"{name}_{readout}", label=f"validation {of_set}", color=f"C{number}", **DOTS)
    if readout == "pixel_accuracy":
        top.axhline(0.5, color="tab:gray", linestyle=":", label="chance")
    _finish(top, readout.replace("_", " "), x_label="")
    _plot(bottom, log_history, f"{reward}/std", color="tab:gray")
    bottom.set_yscale("log")
    _finish(bottom, f"std of raw\n{'metagradients' if reward == 'metagradient' else 'rewards'}")
    figure.savefig(path, dpi=DPI)
    return figure


def plot_learning_curves(
    runs: Mapping[str, Sequence[Sequence[dict[str, Any]]]], path: str | PathLike[str], readout: str = "metric_gain"
) -> "Figure":
    """
    Draws the validation of several kinds of runs in one plot, to compare rewards or settings.

    Args:
        runs (`Mapping[str, Sequence[Sequence[dict]]]`):
            Label → one `trainer.state.log_history` for each seed. The line is the mean over seeds, at the steps where all seeds
            were validated. The band reaches from the worst to the best seed. Several validations at one step of a run are
            averaged.
        path (`str` or `PathLike`):
            PNG file to write.
        readout (`str`, *optional*, defaults to `"metric_gain"`):
            The read-out to draw: `"metric_gain"` or the name of a read-out of the metric, without `eval_`.

    Raises:
        [`ValueError`]: If the runs of one kind have no validated step in common.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    for label, histories in runs.items():
        by_seed = [_validations(history, f"eval_{readout}") for history in histories]
        steps = sorted(set.intersection(*(set(values) for values in by_seed)))
        if not steps:
            raise ValueError(f"The runs {label!r} have no step with an `eval_{readout}` in common.")
        values = np.array([[curve[step] for step in steps] for curve in by_seed])
        seeds = f" ({len(by_seed)} seeds)" if len(by_seed) > 1 else ""
        (line,) = axes.plot(steps, values.mean(axis=0), marker="o", markersize=3.5, label=label + seeds)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15, lw=0)
    _finish(axes, f"{readout.replace('_', ' ')}, validation")
    figure.savefig(path, dpi=DPI)
    return figure


def plot_pattern(
    decoded: Any, pattern: Any, path: str | PathLike[str], text: str | None = None, title: str = "read"
) -> "Figure":
    """
    Draws the wanted picture, and beside it the picture read from a fine-tuned model. Wrong pixels are red.

    Args:
        decoded (array-like of shape `(rows, columns)`):
            Signs that were read, for example `metric.decoded`.
        pattern (array-like of shape `(rows, columns)`):
            Wanted signs, for example `metric.pattern`.
        path (`str` or `PathLike`):
            PNG file to write.
        text (`str`, *optional*):
            Text that a QR reader gets from `decoded`, for the title.
        title (`str`, *optional*, defaults to `"read"`):
            Title of the picture that was read. The share of right pixels is added.
    """
    read = f"{title}: {_percent_right(decoded, pattern)}"
    if text is not None:
        read += f", “{text}”".replace("$", r"\$")
    return _draw_patterns([("asked for", pattern), (read, decoded)], pattern, path, width=3.5)


def plot_patterns(patterns: Mapping[str, Any], path: str | PathLike[str], pattern: Any = None) -> "Figure":
    """
    Draws several patterns side by side, to compare models, rewards or seeds.

    Args:
        patterns (`Mapping[str, array-like]`):
            Title → signs of shape `(rows, columns)`, for example the `signs` of
            [`~trl_dpg.metrics.decode_pattern`]. 0 (the weight did not move) is gray.
        path (`str` or `PathLike`):
            PNG file to write.
        pattern (array-like of shape `(rows, columns)`, *optional*):
            Wanted signs. Wrong pixels are red. The title gets a second line with the share of right pixels.
    """
    titled = [
        (title if pattern is None else f"{title}\n{_percent_right(signs, pattern)}", signs)
        for title, signs in patterns.items()
    ]
    return _draw_patterns(titled, pattern, path, width=1.9)


def plot_series(log_history: Sequence[dict[str, Any]], key: str, path: str | PathLike[str], label: str) -> "Figure":
    """Draws a logged figure over training. `label` is its name with its unit."""
    figure = _figure(7, 2.6)
    axes = figure.subplots()
    values = _plot(axes, log_history, key, color="tab:blue")
    axes.set_ylim(0, 1.08 * max(filter(math.isfinite, values), default=0) or 1)
    _finish(axes, label)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_distribution(quantiles: Mapping[int, Sequence[float]], path: str | PathLike[str], label: str) -> "Figure":
    """
    Draws how a distribution changes over training, as its median with bands around it.

    `quantiles` maps a step to minimum, 5 %, 25 %, median, 75 %, 95 % and maximum. `label` is the name of the quantity.
    """
    steps = sorted(quantiles)
    values = np.array([quantiles[step] for step in steps]).T
    largest = np.abs(values).max()
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    if -2 <= exponent <= 2:
        exponent = 0
    values = values / 10.0**exponent
    figure = _figure(7, 3)
    axes = figure.subplots()
    bands = (("all", 0, 6, 0.12), ("5 % to 95 %", 1, 5, 0.22), ("25 % to 75 %", 2, 4, 0.4))
    for name, low, high, alpha in bands:
        axes.fill_between(steps, values[low], values[high], color="tab:blue", alpha=alpha, lw=0, label=name)
    axes.plot(steps, values[3], color="tab:blue", label="median")
    axes.axhline(0, color="gray", lw=0.8)
    unit = f" / 10$^{{{exponent}}}$" if exponent else ""
    _finish(axes, label.replace("_", " ") + unit, columns=4)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_check(check: MetagradientCheck, path: str | PathLike[str]) -> "Figure":
    """Draws the measured changes of a check against those that metagradients predict: all weights on the left, probes on the right."""
    figure = _figure(8.5, 4.2)
    left, right = figure.subplots(1, 2)
    changes = np.array(check.changes)
    for shift, fill, color in ((1.0, "full", "tab:blue"), (0.5, "none", "tab:orange")):
        both = (SHIFTS.abs() == shift).numpy()
        style = {"fillstyle": fill, "color": color, "label": f"all weights ± {shift * check.radius:g}"}
        left.plot(np.outer(check.predicted, SHIFTS[both]).ravel(), changes[:, both].ravel(), "o", **style)
    left.set_title(f"re-weightings: slope {check.slope:.3f}, smoothness {check.smoothness:.2f}", fontsize=10)
    left.set(xlabel="change of the metric, predicted", ylabel="measured")
    for verdict, color in (("agrees", "tab:green"), ("disagrees", "tab:red"), ("unclear", "tab:gray")):
        if probes := [p for p in check.probes if p.verdict == verdict]:
            x, y = [p.predicted for p in probes], [p.measured for p in probes]
            errors = [p.step_error + p.rounding_error for p in probes]
            right.errorbar(x, y, errors, fmt="o", capsize=4, color=color, label=verdict)
    for p in check.probes:
        right.annotate(str(p.example), (p.predicted, p.measured), (6, -10), textcoords="offset points", fontsize=8)
    right.set_title("probes, by number of the example", fontsize=10)
    right.set(xlabel="metagradient", ylabel="finite difference")
    for axes in (left, right):
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(scilimits=(-2, 3))
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Metagradients: {check.verdict}")
    figure.savefig(path, dpi=DPI)
    return figure


def animate(paths: Sequence[PathLike[str]], path: str | PathLike[str]) -> None:
    """Makes a GIF of pictures, at half their size. Pictures may differ a little in size, since titles have different lengths."""
    first, *rest = [Image.open(picture).convert("RGB").reduce(2) for picture in paths]
    frames = [ImageOps.pad(frame, first.size, color="white") for frame in rest]
    first.save(path, save_all=True, append_images=frames, duration=[400] * len(frames) + [2_000], loop=0)


def _draw_patterns(titled: list[tuple[str, Any]], pattern: Any, path: str | PathLike[str], width: float) -> "Figure":
    from matplotlib.colors import to_rgb

    rows = math.ceil(len(titled) / 5)
    columns = math.ceil(len(titled) / rows)
    shape = np.asarray(titled[0][1]).shape
    border = 4 if min(shape) >= 21 else 0  # the quiet zone that a phone needs to read a QR code
    height = width * (shape[0] + 2 * border) / (shape[1] + 2 * border)
    height += 0.2 * max(title.count("\n") + 1 for title, _ in titled)
    figure = _figure(width * columns, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(titled) :]:
        axes.axis("off")
    for axes, (title, signs) in zip(grid, titled, strict=False):
        signs = np.asarray(signs)
        wrong = signs != np.asarray(pattern) if pattern is not None else np.zeros(signs.shape, bool)
        picture = np.empty((*signs.shape, 3))
        picture[:] = to_rgb(UNMOVED)
        for sign, right_color, wrong_color in ((1, DARK, WRONG_DARK), (-1, LIGHT, WRONG_LIGHT)):
            picture[(signs == sign) & ~wrong] = to_rgb(right_color)
            picture[(signs == sign) & wrong] = to_rgb(wrong_color)
        axes.imshow(np.pad(picture, ((border, border), (border, border), (0, 0)), constant_values=1))
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("lightgray")
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # imported here: it takes half a second, and most processes draw nothing

    return Figure(figsize=(width, height), layout="constrained")


def _percent_right(signs: Any, pattern: Any) -> str:
    share = (np.asarray(signs) == np.asarray(pattern)).mean()
    return "100%" if share == 1 else f"{math.floor(share * 1000) / 10:.1f}%"  # 2000 of 2001 pixels are 99.9%


def _validations(log_history: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    by_step = defaultdict(list)
    for row in log_history:
        if row.get(key) is not None:
            by_step[row["step"]].append(row[key])
    return {step: fmean(values) for step, values in by_step.items()}


def _plot(axes: "Axes", log_history: Sequence[dict[str, Any]], key: str, **style: Any) -> list[float]:
    """Draws a logged figure at the steps where it was logged, and returns its values."""
    points = [(row["step"], row[key]) for row in log_history if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
    return [value for _, value in points]


def _finish(axes: "Axes", y_label: str, x_label: str = "GRPO step", columns: int = 2) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # the legend stands above the plot, where it hides nothing
        axes.legend(
            handles, labels, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2
        )
