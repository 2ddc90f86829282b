r"""Metrics \\( \Phi \\): what a target is fine-tuned for."""

from abc import ABC, abstractmethod
from functools import partial
from numbers import Real
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn


class Metric(ABC):
    r"""
    Base of metrics \\( \Phi \\): differentiable functions of the fine-tuned target, higher is better.

    A plain function `metric(model) -> scalar tensor` works wherever a metric does, and so does one with some of these methods.
    Every method but `__call__` has a default that does nothing. What they return is shown in logs, reports and cards.

    Example:

    ```python
    >>> from trl_dpg.metrics import Metric

    >>> class Sparsity(Metric):
    ...     "Share of the LM head's weights that are near zero."
    ...
    ...     def __call__(self, model):
    ...         return (-model.lm_head.weight.abs()).exp().mean()
    ...
    ...     def describe(self):
    ...         return {**super().describe(), "effect": "its LM head becomes sparse"}
    >>> Sparsity().describe()["description"]
    "Share of the LM head's weights that are near zero."

    ```
    """

    @abstractmethod
    def __call__(self, model: nn.Module) -> Tensor:
        r"""\\( \Phi \\) of a model, shape `()`."""

    def setup(self, model: nn.Module) -> None:  # noqa: B027 (a hook)
        """Called on the original model before each fine-tuning run."""

    def readouts(self, model: nn.Module) -> dict[str, float]:
        """Numbers of a fine-tuned model that a person can read."""
        return {}

    def picture(self) -> tuple[Tensor, Tensor] | None:
        """Signs that `readouts` read back last, and the signs that are wanted, both of shape `(rows, columns)`; or `None`."""
        return None

    def decode(self, before: str | PathLike[str], after: str | PathLike[str]) -> dict[str, Any]:
        """Read-outs from two checkpoints alone, the original model's and the fine-tuned one's; and the picture."""
        return {}

    def judge(self, data: dict[str, Any], other: dict[str, Any]) -> tuple[bool, str]:
        r"""
        Whether data did what it should, and by which criterion.

        Args:
            data (`dict[str, Any]`): `"metric"` and read-outs after fine-tuning on the data.
            other (`dict[str, Any]`): The same after fine-tuning on a control, or of the original model.
        """
        return data["metric"] > other["metric"], "Φ is above that of the comparison"

    def describe(self) -> dict[str, Any]:
        r"""
        What the metric wants, for cards and reports.

        Returns:
            `dict[str, Any]`: `name`; `effect`, what is to become true of a target, as a clause; `description`; and `readouts`, the
                read-outs to show beside the verdict. It is that of the last one if that is `pixel_accuracy`, `qr_decoded` or
                `exact_match`, which are to be 1; else the gain of \\( \\Phi \\) decides. All of it must be JSON, and may be published.
                What is left out has a default.
        """
        return description_of(self)

    def state(self) -> dict[str, Any]:
        """What was measured and should survive a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (a hook)
        """Takes up what [`~Metric.state`] gave."""


class FunctionMetric(Metric):
    """
    A metric that is no [`Metric`]: a function, or an object with some of the methods.

    Args:
        function (`Callable`): The metric.
    """

    def __init__(self, function: Any):
        self.function = function
        for name in ("setup", "readouts", "picture", "decode", "judge", "state", "load_state"):
            if callable(getattr(function, name, None)):
                setattr(self, name, getattr(function, name))

    def __call__(self, model: nn.Module) -> Tensor:
        return self.function(model)

    def describe(self) -> dict[str, Any]:
        function = self.function
        said = function.describe() if hasattr(function, "describe") else {}
        while isinstance(function, partial):
            function = function.func
        return {**description_of(function), **said}


def as_metric(metric: Any) -> Metric:
    """A [`Metric`] of whatever a user may pass."""
    return metric if isinstance(metric, Metric) else FunctionMetric(metric)


def description_of(metric: Any) -> dict[str, Any]:
    """What the name and the first line of the documentation say, see [`~Metric.describe`]."""
    name = getattr(metric, "__name__", type(metric).__name__)
    lines = (metric.__doc__ or "").strip().splitlines() or [f"The metric `{name}`."]
    effect = f"its `{name}` rises"
    return {"name": name, "effect": effect, "description": lines[0], "readouts": ["metric_gain"]}


def description(metric: Metric) -> dict[str, Any]:
    """What [`~Metric.describe`] says, with defaults for what it leaves out."""
    return {**description_of(metric), **metric.describe()}


# What is logged beside read-outs, under the same prefix
RESERVED = {
    "metric",
    "metric_before",
    "metric_after",
    "metric_gain",
    "target_loss",
    "target_steps",
    "adam_epsilon_root",
}
RESERVED |= {
    "mean",
    "std",
    "min",
    "max",
    "nonfinite",
    "empty",
    "truncated",
    "cut",
    "seconds",
    "skipped",
    "replayed",
    "distinct",
    "completion_length",
}


def read_out(metric: Metric, model: Any) -> dict[str, float]:
    """
    Read-outs of a model, checked.

    Raises:
        [`ValueError`]: If they are not numbers with names, or a name is that of something else in the logs.
    """
    values = metric.readouts(model)
    if not isinstance(values, dict) or not all(isinstance(value, Real) for value in values.values()):
        raise ValueError(
            f"`readouts` of `metric` must return a dict of numbers, got {values!r:.120}. Return names and floats."
        )
    if taken := sorted(RESERVED & values.keys()):
        raise ValueError(f"`readouts` of `metric` returned {taken}, which the logs have already. Choose other names.")
    return dict(values)


def evaluate(metric: Metric, model: Any) -> Tensor:
    r"""
    \\( \Phi \\) of a model, checked.

    Raises:
        [`ValueError`]: If it is no scalar tensor.
        [`FloatingPointError`]: If it is not finite.
    """
    value = metric(model)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(
            f"`metric` must return a scalar tensor, got one of {what}. Reduce it, for example with `.mean()`, and return it as a "
            "tensor, without `.item()` or `float()`."
        )
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"`metric` returned {value.item()}. Check its formula on this model, and lower `learning_rate` if only the "
            "fine-tuned model gives such a value."
        )
    return value.reshape(())
