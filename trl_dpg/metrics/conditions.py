"""Conditions: what is to stay as it is while a target is fine-tuned for something else."""

import math
from typing import Any, ClassVar

import torch
from torch import nn

from ..metagradients.metric import Metric, as_metric, description, evaluate, read_out, snake_case
from ..metagradients.runtime.host import double


class Condition(Metric):
    """What [`KeepBelow`] and [`KeepAbove`] have in common."""

    side: ClassVar[str]
    sign: ClassVar[int]  # of the direction in which the limit is passed

    def __init__(self, metric: Any, limit: float | None = None, *, factor: float | None = None):
        if not callable(metric) or isinstance(metric, type):
            raise ValueError(
                f"`metric` must be a function of the target, or an instance of a metric, got {metric!r}. Make an instance."
            )
        if (limit is None) == (factor is None):
            raise ValueError(
                f"One of `limit` and `factor` must be given, got {limit!r} and {factor!r}. `factor` is relative to the untouched target."
            )
        for name, value in (("limit", limit), ("factor", factor)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"`{name}` must be finite, got {value}.")
        self.metric, self.limit, self.factor = as_metric(metric), limit, factor
        self.name = snake_case(description(self.metric)["name"])

    def setup(self, model: nn.Module) -> None:
        """Sets the metric up. With `factor`, measures the limit on the untouched target."""
        self.metric.setup(model)
        if self.factor is not None:
            with torch.no_grad():
                value = evaluate(self.metric, model).item()
            self.limit = value + (self.factor - 1) * abs(value)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        r"""\\( \Phi \\), shape `()`: 0 while the condition holds, else minus the square of the relative excess."""
        return -torch.relu(self._excess(model)).square()

    @torch.no_grad()
    def readouts(self, model: nn.Module) -> dict[str, float]:
        """Read-outs of the metric; `NAME_below_limit`, 1.0 if the condition holds; and `NAME_below_limit_by`, relative to the limit."""
        excess = self._excess(model).item()
        name = f"{self.name}_{self.side}_limit"
        return {**read_out(self.metric, model), name: float(excess <= 0), f"{name}_by": -excess}

    def _excess(self, model: nn.Module) -> torch.Tensor:
        if self.limit is None:
            raise ValueError(
                f"`{type(self).__name__}.setup(model)` must be called on the original model before fine-tuning."
            )
        excess = self.sign * (double(evaluate(self.metric, model)) - self.limit)
        return excess / (abs(self.limit) or 1.0)

    def describe(self) -> dict[str, Any]:
        """As of [`~trl_dpg.metrics.Metric.describe`], with `conditions`, the read-out that is to be 1."""
        inner = description(self.metric)
        limit = f"{self.limit:g}" if self.factor is None else f"{self.factor:g} times that of the untouched target"
        holds = f"{self.name}_{self.side}_limit"
        return {
            "name": f"{type(self).__name__}({inner['name']})",
            "effect": f"its `{inner['name']}` stays {self.side} {limit}",
            "description": f"A penalty while `{inner['name']}` is not {self.side} {limit}. {inner['description']}",
            "readouts": [holds],
            "conditions": [holds],
        }

    def state(self) -> dict[str, Any]:
        """What the metric measured. The limit of a `factor` is measured before each run, and the same each time."""
        return self.metric.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what [`~Condition.state`] gave."""
        self.metric.load_state(state)


class KeepBelow(Condition):
    r"""
    A condition beside a goal: a value v of the fine-tuned target stays at or below a limit L.

    Φ = −max(0, (v − L) / |L|)², without the division where L is 0. It is exactly 0 while the condition holds, and differentiable at
    the limit. Add it to a goal with a weight: with 1000, one percent above the limit costs 0.1.

    The penalty begins at the limit, so a goal that pulls against it ends a little beyond: set the limit tighter than you need it.

    Costs an evaluation of the metric for each run, and with `factor` a second one.

    Args:
        metric (`Callable`):
            What is limited, for example [`Perplexity`]. Here, higher need not be better.
        limit (`float`, *optional*):
            The limit L.
        factor (`float`, *optional*):
            Instead of `limit`: L relative to the untouched target, u + (`factor` − 1) · |u| with its value u. 1.01 is 1 % more.

    Raises:
        [`ValueError`]: If not exactly one of `limit` and `factor` is given, if it is not finite, or if `metric` is no metric.

    Example:

    ```python
    >>> from trl_dpg.metrics import KeepBelow, LMHeadPattern, Perplexity

    >>> texts = [{"text": "the old boat on the sea"}]
    >>> metric = LMHeadPattern.qr("DPG") + 1000 * KeepBelow(Perplexity(texts), factor=1.01)
    >>> metric.describe()["readouts"]
    ['perplexity_below_limit', 'pixel_accuracy', 'qr_decoded']

    ```
    """

    side, sign = "below", 1


class KeepAbove(Condition):
    """
    As [`KeepBelow`], for a value that stays at or above a limit: `KeepAbove(likelihood, factor=0.99)` allows 1 % less.

    Args:
        metric, limit, factor:
            As of [`KeepBelow`].
    """

    side, sign = "above", -1
