"""What a check of metagradients found: figures, verdict and advice."""

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal

import torch

from .method.recipe import TargetTrainingArguments


SHIFTS = torch.tensor([1.0, 0.5, -0.5, -1.0], dtype=torch.float64)  # of the weights, in radii
MIN_CORRELATION, SLOPE_TOLERANCE, MIN_SMOOTHNESS = 0.95, 0.1, 0.5
MAX_NOISE = 0.1  # of the change of the metric that is to be judged


@dataclass
class Probe:
    r"""
    One example whose weight was moved alone, by ± the radius h and by half of it.

    `predicted` is its metagradient and `measured` \\( (4 D(h/2) - D(h)) / 3 \\), where \\( D \\) is the central difference.
    `step_error` is \\( |D(h/2) - D(h)| \\), and `rounding_error` 4 noise / h, about three standard errors.
    """

    example: int
    predicted: float
    measured: float
    step_error: float
    rounding_error: float
    verdict: Literal["agrees", "disagrees", "unclear"]


@dataclass
class MetagradientCheck:
    r"""
    Result of [`check_metagradients`].

    Let \\( c_{ks} \\) be the measured change of Φ when the weights move by s radii along direction k,
    \\( s \in \{1, ½, -½, -1\} \\), \\( p_k \\) the one predicted for \\( s = 1 \\), and
    \\( o_k = (c_{k,1} - c_{k,-1}) / 2 \\), in which curvature cancels. The verdict is

    - `"failed"` if a probe disagrees (predicted and measured differ by more than its errors plus 5%), or if the noise is at
      most 10% of the root mean square of \\( o \\) and `correlation` < 0.95, |`slope` − 1| > 0.1 or `smoothness` < 0.5;
    - `"inconclusive"` if the noise is larger than that, if every probe is unclear (its errors exceed 25%), or if rounding
      may be behind a failure: AdamW's `learning_rate` is below 100 spacings of floating-point numbers at the mean size
      of the trained parameters;
    - `"passed"` otherwise.

    Percentages of a probe are of what it measured, or of the root mean square of all metagradients where that is larger.

    Attributes:
        verdict (`str`): `"passed"`, `"failed"` or `"inconclusive"`.
        advice (`list[str]`): What to look into, by symptom.
        correlation (`float`): \\( \langle p, o \rangle / \lVert p \rVert \lVert o \rVert \\), over the antithetic pairs.
        slope (`float`): Actual over predicted change, \\( \langle p, o \rangle / \lVert p \rVert^2 \\).
        r_squared (`float`): \\( 1 - \sum (c_{ks} - s p_k)^2 / \sum c_{ks}^2 \\), so curvature counts.
        smoothness (`float`):
            \\( 1 - \sqrt{1 - \sum_k (\sum_s s c_{ks})^2 / (\sum_s s^2 \sum_{ks} c_{ks}^2)} \\): one less the distance of the
            changes from a straight line through each direction, relative to their size. In [0, 1], 1 is perfectly
            linear. Metagradients do not enter.
        noise (`float`):
            Standard error of a value of Φ: the largest of its last digit, the difference between two equal runs, and half
            the second difference within a hundredth of the radius, where the curvature of a smooth Φ no longer counts.
        metric_before (`float`): Φ of the original model.
        metric_after (`float`): Φ of the fine-tuned model.
        adam_epsilon_root (`float`): The value used.
        radius (`float`): How far weights were moved.
        probes (`list[Probe]`): Single examples.
        predicted (`list[float]`): \\( p_k \\).
        changes (`list[list[float]]`): \\( c_{ks} \\), one row per direction.
    """

    verdict: Literal["passed", "failed", "inconclusive"]
    advice: list[str]
    correlation: float
    slope: float
    r_squared: float
    smoothness: float
    noise: float
    metric_before: float
    metric_after: float
    adam_epsilon_root: float
    radius: float
    probes: list[Probe]
    predicted: list[float]
    changes: list[list[float]]

    @property
    def passed(self) -> bool:
        """Whether the verdict is `"passed"`."""
        return self.verdict == "passed"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"Metagradients: {self.verdict}",
            f"metric {self.metric_before:.7g} -> {self.metric_after:.7g}, noise {self.noise:.1e}, adam_epsilon_root {self.adam_epsilon_root:.3g}",
            f"all weights ± {self.radius:g}, {len(self.predicted)} directions: correlation {self.correlation:.4f}, slope "
            f"{self.slope:.3f}, R² {self.r_squared:.4f}, smoothness {self.smoothness:.3f}",
            f"{'example':>7} {'predicted':>12} {'measured':>12} {'step error':>10} {'rounding':>9}",
        ]
        for p in self.probes:
            errors = f"{p.step_error:>10.1e} {p.rounding_error:>9.1e}"
            lines.append(f"{p.example:>7} {p.predicted:>12.4e} {p.measured:>12.4e} {errors}  {p.verdict}")
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.advice)])

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws measured against predicted changes as a PNG file."""
        from ..reporting.plotting import plot_check  # the engine alone draws nothing

        plot_check(self, path)


def signal(result: MetagradientCheck) -> float:
    """Root mean square of the changes that are judged, free of curvature."""
    changes = torch.tensor(result.changes, dtype=torch.float64)
    return ((changes[:, 0] - changes[:, 3]) / 2).square().mean().sqrt().item()


def is_clear(result: MetagradientCheck) -> bool:
    """Whether re-weightings move the metric by far more than its noise."""
    return signal(result) > 0 and result.noise <= MAX_NOISE * signal(result)


def judge(result: MetagradientCheck) -> Literal["passed", "failed", "inconclusive"]:
    """The verdict of [`MetagradientCheck`], where steps are not rounded."""
    matched = result.correlation >= MIN_CORRELATION and abs(result.slope - 1) <= SLOPE_TOLERANCE
    verdicts = {probe.verdict for probe in result.probes}
    if "disagrees" in verdicts or (is_clear(result) and not (matched and result.smoothness >= MIN_SMOOTHNESS)):
        return "failed"
    return "passed" if is_clear(result) and verdicts != {"unclear"} else "inconclusive"


def advise_on_noise(result: MetagradientCheck, remedy: str) -> str:
    """Advice where the metric is too uncertain. `remedy` lowers the noise."""
    remedy += ", or raise `radius`."
    if is_clear(result) and all(p.step_error > p.rounding_error for p in result.probes):
        remedy = "The finite differences depend on their step, though: lower `radius`."
    return f"The metric is uncertain by {result.noise:.1e} and re-weighting moves it by {signal(result):.1e}. {remedy}"


def advise_on_failure(
    result: MetagradientCheck, args: TargetTrainingArguments, automatic: float, losses: list[float]
) -> list[str]:
    """Advice where metagradients failed. `automatic` is what `adam_epsilon_root="auto"` comes to, `losses` are those of the steps."""
    advice = []
    if args.optim == "adamw" and result.adam_epsilon_root < 0.01 * automatic:
        advice.append(
            f'`adam_epsilon_root` {result.adam_epsilon_root:.3g} is far below the {automatic:.1e} that "auto" would take: '
            "AdamW's step is little more than the gradient's sign, which jumps. Set it to \"auto\"."
        )
    diverges = losses[-1] > 1.2 * losses[0]
    if diverges or (result.smoothness < MIN_SMOOTHNESS and not advice):
        rise = f", and the loss rose from {losses[0]:.3g} to {losses[-1]:.3g}" if diverges else ""
        advice.append(
            f"The metric is not smooth in the examples' weights (smoothness {result.smoothness:.2f}){rise}. Lower "
            f"`learning_rate` {args.learning_rate:g}, take fewer steps or set `max_grad_norm`. A smaller `radius` shows how "
            "far metagradients hold."
        )
    return advice or [
        "The metric is smooth, but its slope is not what metagradients say. If the gradient of `metric` is that of its value "
        "(no `detach`, no rounding; see `torch.autograd.gradcheck`), check `model.double()`, then report a bug."
    ]
