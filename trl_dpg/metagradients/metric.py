r"""Metrics \\( \Phi \\), which say what the fine-tuned target should be like."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Real
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .runtime.host import double


class Metric(ABC):
    r"""
    Base of metrics \\( \Phi \\): differentiable functions of the fine-tuned target, higher is better.

    A plain function `metric(model) -> scalar tensor` works wherever a metric does. So does any callable object with some of these
    methods. Only `__call__` must be defined. Results of the other methods appear in logs, reports and model cards.

    Metrics can be added and scaled: `a + 0.1 * b`, `a - b` and `-a` are metrics, see [`WeightedSum`].

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
        """Numbers about a fine-tuned model that a person understands, such as an accuracy, by name."""
        return {}

    def picture(self) -> tuple[Tensor, Tensor] | None:
        """Signs that the last call of `readouts` found, and the wanted signs, each of shape `(rows, columns)`. `None` without any."""
        return None

    def decode(self, before: str | PathLike[str], after: str | PathLike[str]) -> dict[str, Any]:
        """Read-outs and the picture from two checkpoints alone, of the original model and of the fine-tuned one."""
        return {}

    def judge(self, data: dict[str, Any], other: dict[str, Any]) -> tuple[bool, str]:
        r"""
        Judges whether training data had the wanted effect. Returns the verdict and the criterion in words.

        Args:
            data (`dict[str, Any]`): `"metric"` and read-outs after fine-tuning on the data.
            other (`dict[str, Any]`): The same after fine-tuning on control data, or of the original model.
        """
        return data["metric"] > other["metric"], "Φ is higher than in the comparison"

    def describe(self) -> dict[str, Any]:
        r"""
        Describes the metric for model cards and reports.

        Returns:
            `dict[str, Any]`: `name`; `effect`, a clause that says what should become true of a target; `description`; and `readouts`,
                names of the read-outs to show beside the verdict. The last of these decides the verdict if it is `pixel_accuracy`,
                `qr_decoded` or `exact_match`, which should be 1. Otherwise the gain of \\( \\Phi \\) decides. All values must be JSON,
                and may be published. Keys that are left out have defaults.
        """
        return description_of(self)

    def state(self) -> dict[str, Any]:
        """Measured values that checkpoints should keep."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (a hook)
        """Restores the result of [`~Metric.state`] from a checkpoint."""

    def __add__(self, other: Any) -> "WeightedSum":
        return _weighted_sum((1.0, self), (1.0, other))

    def __radd__(self, other: Any) -> "WeightedSum":
        return _weighted_sum((1.0, other), (1.0, self))

    def __sub__(self, other: Any) -> "WeightedSum":
        return _weighted_sum((1.0, self), (-1.0, other))

    def __rsub__(self, other: Any) -> "WeightedSum":
        return _weighted_sum((1.0, other), (-1.0, self))

    def __mul__(self, weight: float) -> "WeightedSum":
        return WeightedSum([(weight, self)]) if isinstance(weight, Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> "WeightedSum":
        return -1.0 * self


class FunctionMetric(Metric):
    """
    Makes a [`Metric`] of a function, or of a callable object with some of the methods.

    Args:
        function (`Callable`): The function or object.
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
    """Makes a [`Metric`] of any metric that a user may pass. Raises a [`ValueError`] if it cannot be called."""
    if not callable(metric) or isinstance(metric, type):
        raise ValueError(
            f"`metric` must be a function of the fine-tuned model that returns a scalar tensor, got {metric!r:.80}. Pass a function, "
            "or an instance of a class, such as those in `trl_dpg.metrics`."
        )
    return metric if isinstance(metric, Metric) else FunctionMetric(metric)


class WeightedSum(Metric):
    r"""
    A weighted sum of metrics, as made by `a + 0.1 * b`, `a - b` and `-a`. Each part may be a plain function.

    The sum calls `setup`, `readouts` and `describe` of every part. A part of weight 0 adds read-outs, but nothing to \\( \Phi \\).

    Read-outs are those of all parts, and each part's value as `NAME_value`. `NAME` is the part's name in snake case, such as
    `lm_head_norm`. If an earlier part has a read-out of the same name, `NAME_` is put in front. If several parts have the same name,
    they are numbered from the second on.

    Memory holds the activations of all parts until the gradient is computed.

    Args:
        terms (`Sequence[tuple[float, Callable]]`):
            Weights and metrics.

    Raises:
        [`ValueError`]: If a weight is not finite. In `setup` and in calls, also if all weights are 0.

    Example:

    ```python
    >>> from trl_dpg.metrics import LMHeadNorm, LMHeadPattern

    >>> metric = LMHeadPattern.qr("DPG") + 0.1 * LMHeadNorm()
    >>> metric.describe()["name"]
    'LMHeadPattern + 0.1 * LMHeadNorm'

    ```
    """

    def __init__(self, terms: Sequence[tuple[float, Any]]):
        self.parts: list[tuple[float, Metric]] = []
        for weight, metric in terms:
            if not abs(weight) < float("inf"):
                raise ValueError(f"The weight of a metric must be finite, got {weight}. Multiply by a number.")
            inner = metric.parts if isinstance(metric, WeightedSum) else [(1.0, as_metric(metric))]
            self.parts += [(float(weight) * own, part) for own, part in inner]

    @property
    def names(self) -> list[str]:
        """A name for each part. All names differ."""
        names: list[str] = []
        for _, metric in self.parts:
            name = snake_case(description(metric)["name"])
            number = sum(re.fullmatch(rf"{name}(_\d+)?", earlier) is not None for earlier in names)
            names.append(f"{name}_{number + 1}" if number else name)
        return names

    def _check_weights(self) -> None:  # not in `__init__`, since `0 * a` may become a part of another sum
        if not any(weight for weight, _ in self.parts):
            raise ValueError(
                f"`metric` {self.describe()['name']!r} trains nothing, since all weights of its parts are 0. Add a part with "
                "another weight."
            )

    def setup(self, model: nn.Module) -> None:
        self._check_weights()
        for _, metric in self.parts:
            metric.setup(model)

    def __call__(self, model: nn.Module) -> Tensor:
        self._check_weights()
        values = [double(weight * evaluate(metric, model)) for weight, metric in self.parts if weight != 0]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    @torch.no_grad()
    def readouts(self, model: nn.Module) -> dict[str, float]:
        """Read-outs and values of all parts. Evaluates each part once more."""
        own = [read_out(metric, model) for _, metric in self.parts]
        shown = self._shown(own)
        values = {shown[i][key]: value for i, part in enumerate(own) for key, value in part.items()}
        for name, (_, metric) in zip(self.names, self.parts, strict=True):
            values[f"{name}_value"] = evaluate(metric, model).item()
        return values

    def _shown(self, own: Sequence[Iterable[str]]) -> list[dict[str, str]]:
        """The name under which each read-out of each part is shown."""
        shown: list[dict[str, str]] = []
        for part, keys in zip(self.names, own, strict=True):
            taken = {name for earlier in shown for name in earlier.values()}
            shown.append({key: f"{part}_{key}" if key in taken else key for key in keys})
        return shown

    def picture(self) -> tuple[Tensor, Tensor] | None:
        """The picture of the first part that has one."""
        return next((picture for _, metric in self.parts if (picture := metric.picture()) is not None), None)

    def decode(self, before: str | PathLike[str], after: str | PathLike[str]) -> dict[str, Any]:
        return {key: value for _, metric in self.parts for key, value in metric.decode(before, after).items()}

    def judge(self, data: dict[str, Any], other: dict[str, Any]) -> tuple[bool, str]:
        r"""All conditions and all parts with a `judge` of their own must pass. If no part has one, \\( \Phi \\) must rise."""
        own = [part for _, part in self.parts if "judge" in vars(part) or type(part).judge is not Metric.judge]
        verdicts = [part.judge(data, other) for part in own] or [super().judge(data, other)]
        verdicts += [(data[name] == 1, name.replace("_", " ")) for name in self.describe()["conditions"]]
        return all(passed for passed, _ in verdicts), ", and ".join(criterion for _, criterion in verdicts)

    def describe(self) -> dict[str, Any]:
        """See [`~trl_dpg.metrics.Metric.describe`]. Adds `parts`, their descriptions, and `conditions`, read-outs that should be 1."""
        parts = [description(metric) for _, metric in self.parts]
        weights = [weight for weight, _ in self.parts]
        conditions, readouts = (
            [name for names in self._shown([part.get(key, ()) for part in parts]) for name in names.values()]
            for key in ("conditions", "readouts")
        )
        goals = [name for name in readouts if name not in conditions and not name.endswith("metric_gain")]
        effects = [
            part["effect"] if weight > 0 else f"its `{part['name']}` falls"
            for weight, part in zip(weights, parts, strict=True)
            if weight != 0
        ]
        pictures = [{"picture": part["picture"]} for part in parts if "picture" in part]
        each = [f"{weight:g} × {part['description']}" for weight, part in zip(weights, parts, strict=True)]
        names = [part["name"] if w == 1 else f"{w:g} * {part['name']}" for w, part in zip(weights, parts, strict=True)]
        return {
            "name": " + ".join(names),
            "effect": ", and ".join(effects),
            "description": "A weighted sum. " + " ".join(each),
            "readouts": [*conditions, *goals, *([] if goals else ["metric_gain"])],
            "conditions": conditions,
            "parts": parts,
            **(pictures[0] if pictures else {}),
        }

    def state(self) -> dict[str, Any]:
        return {"parts": [metric.state() for _, metric in self.parts]}

    def load_state(self, state: dict[str, Any]) -> None:
        for (_, metric), part in zip(self.parts, state["parts"], strict=True):
            metric.load_state(part)


def _weighted_sum(*terms: tuple[float, Any]) -> WeightedSum:
    """The sum of metrics. If a term is no metric, `NotImplemented`, which makes Python raise a `TypeError`."""
    if any(isinstance(metric, type) or not callable(metric) for _, metric in terms):
        return NotImplemented
    return WeightedSum(terms)


def snake_case(name: str) -> str:
    """
    Turns the name of a class or function into a part of a read-out's name.

    Example:

    ```python
    >>> snake_case("LMHeadNorm"), snake_case("<lambda>"), snake_case("KeepBelow(Perplexity)")
    ('lm_head_norm', 'lambda', 'keep_below_perplexity')

    ```
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|\W+", "_", name)
    return re.sub(r"_+", "_", words).strip("_").lower()


def description_of(metric: Any) -> dict[str, Any]:
    """A description for [`~Metric.describe`] from the metric's name and the first line of its docstring."""
    name = getattr(metric, "__name__", type(metric).__name__)
    lines = (metric.__doc__ or "").strip().splitlines() or [f"The metric `{name}`."]
    effect = f"its `{name}` rises"
    return {"name": name, "effect": effect, "description": lines[0], "readouts": ["metric_gain"]}


def description(metric: Metric) -> dict[str, Any]:
    """The result of [`~Metric.describe`], with defaults for missing keys."""
    return {**description_of(metric), **metric.describe()}


# Names of other values that are logged under the same prefix as read-outs
RESERVED = set(
    "metric metric_before metric_after metric_gain target_loss target_steps adam_epsilon_root mean std min max nonfinite empty "
    "truncated cut seconds skipped replayed distinct completion_length".split()
)


def read_out(metric: Metric, model: Any) -> dict[str, float]:
    """
    Reads a model out, and checks the read-outs.

    Raises:
        [`ValueError`]: If the read-outs are not a dict of numbers, or if the logs use one of their names for another value.
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
    Evaluates \\( \Phi \\) of a model, and checks the value.

    Raises:
        [`ValueError`]: If the value is no scalar tensor.
        [`FloatingPointError`]: If the value is not finite.
    """
    value = metric(model)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(
            f"`metric` must return a scalar tensor, got one of {what}. Reduce the result, for example with `.mean()`, and return a "
            "tensor, without `.item()` or `float()`."
        )
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"`metric` returned {value.item()}. Check its formula on this model, and lower `learning_rate` if only the "
            "fine-tuned model gives such a value."
        )
    return value.reshape(())
