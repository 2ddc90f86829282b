"""Pictures of a run. Needs Matplotlib (`pip install trl-dpg[examples]`)."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_learning_curve(
    log_history: Sequence[dict[str, Any]], path: str | PathLike[str], readout: str = "metric_gain"
) -> None:
    """
    Draws a read-out over training, and the spread of the raw metagradients below it.

    Args:
        log_history (`Sequence[dict]`):
            `trainer.state.log_history`, with or without evaluations.
        path (`str` or `PathLike`):
            PNG file to write.
        readout (`str`, *optional*, defaults to `"metric_gain"`):
            What to draw: `"metric_gain"` or the name of a read-out of the metric. Its values in the reward's own inner
            runs are a line, those of validation are dots.
    """
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=[3, 1.5], layout="constrained"
    )
    _draw(top, log_history, f"metagradient/{readout}", "training batches", "-", "tab:blue")
    _draw(top, log_history, f"eval_{readout}", "validation (held-out prompts, torch AdamW)", "o", "tab:orange")
    top.set_ylabel(readout.replace("_", " "))
    top.legend(frameon=False)
    _draw(bottom, log_history, "metagradient/std", None, "-", "tab:gray")
    bottom.set_yscale("log")
    bottom.set_ylabel("std of raw\nmetagradients")
    bottom.set_xlabel("GRPO step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_pattern(decoded: Any, pattern: Any, path: str | PathLike[str]) -> None:
    """
    Draws the pattern read from a fine-tuned head beside the one asked for; wrong pixels are framed.

    Args:
        decoded (array-like of shape `(rows, columns)`):
            Signs read, for example `metric.decoded`.
        pattern (array-like of shape `(rows, columns)`):
            Signs asked for, for example `metric.pattern`.
        path (`str` or `PathLike`):
            PNG file to write.
    """
    import matplotlib.pyplot as plt

    decoded, pattern = np.asarray(decoded), np.asarray(pattern)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
    accuracy = (decoded == pattern).mean()
    for axes, signs, title in (
        (left, pattern, "target pattern"),
        (right, decoded, f"read from the head: {accuracy:.1%}"),
    ):
        axes.imshow(signs, cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(title)
        axes.set_xticks(np.arange(signs.shape[1] + 1) - 0.5, labels=[])
        axes.set_yticks(np.arange(signs.shape[0] + 1) - 0.5, labels=[])
        axes.tick_params(length=0)
        axes.grid(color="lightgray", linewidth=0.5)
    for row, column in np.argwhere(decoded != pattern):
        right.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=2))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes: "Axes", log_history, key: str, label: str | None, style: str, color: str) -> None:
    points = [(row["step"], row[key]) for row in log_history if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=color, label=label)
