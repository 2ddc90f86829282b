"""Conditions: properties that a target should keep while it is fine-tuned for another goal."""

import math
from typing import Any, ClassVar

import torch
from torch import nn

from ..metagradients.metric import Metric, as_metric, description, evaluate, read_out, snake_case
from ..metagradients.runtime.host import double


class Condition(Metric):
    """Base class of [`KeepBelow`] and [`KeepAbove`]."""

    side: ClassVar[str]
    sign: ClassVar[int]  # 1 if values above the limit break the condition, -1 if values below it do

    def __init__(self, metric: Any, limit: float | None = None, *, factor: float | None = None):
        self.metric = as_metric(metric)
        if (limit is None) == (factor is None):
            raise ValueError(
                f"One of `limit` and `factor` must be given, got {limit!r} and {factor!r}. `factor` is relative to the untouched target."
            )
        for name, value in (("limit", limit), ("factor", factor)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"`{name}` must be finite, got {value}.")
        self.limit, self.factor = limit, factor
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
        """Read-outs of the metric. Adds `NAME_below_limit`, 1.0 if the condition holds, and `NAME_below_limit_by`, the relative margin."""
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
        """See [`~trl_dpg.metrics.Metric.describe`]. Adds `conditions`, the read-out that should be 1."""
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
        """The state of the metric. The limit of a `factor` is not part of it, since every run measures the same limit again."""
        return self.metric.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the result of [`~Condition.state`]."""
        self.metric.load_state(state)


class KeepBelow(Condition):
    r"""
    A condition to add to a goal: a value v of the fine-tuned target stays at or below a limit L.

    Φ = −max(0, (v − L) / |L|)², without the division if L is 0. Φ is exactly 0 while the condition holds, and differentiable at
    the limit. Add it to a goal with a weight. With a weight of 1000, one percent above the limit costs 0.1.

    The penalty only begins at the limit. If the goal pulls against it, v ends a little above L. So set L tighter than you need it.

    Costs an evaluation of the metric for each run, and with `factor` a second one.

    Args:
        metric (`Callable`):
            The value v to limit, for example [`Perplexity`]. Unlike in other metrics, higher need not be better.
        limit (`float`, *optional*):
            The limit L.
        factor (`float`, *optional*):
            Sets L relative to the value u of the untouched target, instead of `limit`: L = u + (`factor` − 1) · |u|. 1.01 allows 1 %
            more.

    Raises:
        [`ValueError`]: If not exactly one of `limit` and `factor` is given, if it is not finite, or if `metric` cannot be called.

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
    Like [`KeepBelow`], for a value that stays at or above a limit: `KeepAbove(likelihood, factor=0.99)` allows 1 % less.

    Args:
        metric, limit, factor:
            As in [`KeepBelow`].
    """

    side, sign = "above", -1
