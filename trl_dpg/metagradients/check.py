"""Are metagradients right for this model, data, metric and recipe, and do they hold beyond a point? Measured by training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from tqdm.auto import tqdm

from .compute import compute_metagradients, train_and_measure
from .method.recipe import TargetTrainingArguments
from .runtime.model import TargetModel


SHIFTS = torch.tensor([1.0, 0.5, -0.5, -1.0], dtype=torch.float64)  # of the weights, in radii
PROBE_TOLERANCE = 0.05  # of the slope measured, or of the root mean square of all metagradients where that is larger
MIN_CORRELATION, SLOPE_TOLERANCE, MIN_SMOOTHNESS = 0.95, 0.1, 0.5
MAX_NOISE = 0.1  # of the change of the metric that is to be judged
MIN_SPACINGS = 100  # of floating-point numbers in AdamW's learning rate, for a mismatch not to be put down to rounding


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
        import matplotlib.pyplot as plt  # slow to import

        figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 4.2), layout="constrained")
        predicted, changes = torch.tensor(self.predicted), torch.tensor(self.changes)
        for shift, fill, color in ((1.0, "full", "tab:blue"), (0.5, "none", "tab:orange")):
            both = SHIFTS.abs() == shift
            x, y = (predicted[:, None] * SHIFTS[both]).flatten(), changes[:, both].flatten()
            left.plot(x, y, "o", fillstyle=fill, color=color, label=f"all weights ± {shift * self.radius:g}")
        left.set_title(f"re-weightings: slope {self.slope:.3f}, smoothness {self.smoothness:.2f}", fontsize=10)
        left.set(xlabel="change of the metric, predicted", ylabel="measured")
        for p in self.probes:
            color = {"agrees": "tab:green", "disagrees": "tab:red", "unclear": "tab:gray"}[p.verdict]
            right.errorbar(
                p.predicted,
                p.measured,
                p.step_error + p.rounding_error,
                fmt="o",
                capsize=4,
                color=color,
                label=p.verdict,
            )
            right.annotate(str(p.example), (p.predicted, p.measured), (6, -10), textcoords="offset points", fontsize=8)
        right.set_title("probes, by number of the example", fontsize=10)
        right.set(xlabel="metagradient", ylabel="finite difference")
        for axes in (left, right):
            axes.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.ticklabel_format(scilimits=(-2, 3))
            handles, labels = axes.get_legend_handles_labels()
            legend = dict(zip(labels, handles, strict=True))
            axes.legend(legend.values(), legend, frameon=False, fontsize=8)
        figure.suptitle(f"Metagradients: {self.verdict}")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def check_metagradients(
    model: TargetModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Callable[[Any], Tensor],
    args: TargetTrainingArguments | None = None,
    num_probes: int = 4,
    num_reweightings: int = 8,
    radius: float = 0.1,
    seed: int = 0,
    accelerator: Accelerator | PartialState | None = None,
) -> MetagradientCheck:
    r"""
    Compares metagradients with what fine-tuning on re-weighted examples does.

    Costs one call of [`compute_metagradients`] and 6 + 4 (`num_probes` + `num_reweightings`) plain fine-tuning runs. What
    the first run measures (`adam_epsilon_root="auto"`, a metric's automatic scale) is kept for the others.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`compute_metagradients`], and so are `examples` (a part of the data will do), `metric`, `args` and
            `accelerator`.
        num_probes (`int`, *optional*, defaults to `4`):
            Examples to move alone: half of them those with the largest metagradients, half at random.
        num_reweightings (`int`, *optional*, defaults to `8`):
            Directions of random signs to move all weights along.
        radius (`float`, *optional*, defaults to `0.1`):
            How far weights are moved. They are 1 unless the examples say otherwise.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of examples and directions.

    Returns:
        [`MetagradientCheck`]

    Raises:
        [`ValueError`]: If an argument is out of its range or cannot be used.
        [`FloatingPointError`]: If a run is not finite.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from trl_dpg.metagradients import TargetTrainingArguments
    >>> from trl_dpg.metagradients.check import check_metagradients

    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)).double()
    >>> examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
    >>> args = TargetTrainingArguments()
    >>> check_metagradients(model, examples, lambda model: -model.lm_head.weight.norm(), args).verdict
    'passed'

    ```
    """
    args = args or TargetTrainingArguments()
    for name, number in (("num_probes", num_probes), ("num_reweightings", num_reweightings)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if not 0 < radius < math.inf:
        raise ValueError(f"`radius` must be a finite number above 0, got {radius}. Weights are 1 by default: try 0.1.")
    quiet = replace(args, disable_tqdm=True)
    out = compute_metagradients(model, examples, metric, quiet, accelerator)
    quiet = replace(quiet, micro_batch_size=out.micro_batch_size)
    if args.adam_epsilon_root == "auto":
        quiet = replace(quiet, adam_epsilon_root=out.adam_epsilon_root)
    gradients = out.metagradients.double()
    weights = torch.tensor([1.0 if e.get("weight") is None else float(e["weight"]) for e in examples]).double()
    count = len(weights)

    generator = torch.Generator().manual_seed(seed)
    directions = torch.randint(2, (num_reweightings + 2, count), generator=generator).double() * 2 - 1
    largest = gradients.abs().argsort(descending=True, stable=True)
    split = (min(num_probes, count) + 1) // 2
    others = largest[split:][torch.randperm(count - split, generator=generator)[: num_probes // 2]]
    probed = [*largest[:split].tolist(), *others.tolist()]

    values = []
    hidden = True if accelerator is not None and accelerator.process_index != 0 else args.disable_tqdm
    with tqdm(total=6 + 4 * (len(probed) + num_reweightings), desc="Check", leave=False, disable=hidden) as progress:

        def metric_at(shift: Tensor) -> float:
            shifted = [{**e, "weight": w} for e, w in zip(examples, (weights + shift).tolist(), strict=True)]
            values.append(train_and_measure(model, shifted, metric, quiet, accelerator).metric_after)
            progress.update()
            return values[-1]

        def changes_along(direction: Tensor) -> list[float]:
            return [metric_at(shift * radius * direction) - value for shift in SHIFTS]

        value = metric_at(torch.zeros(count))
        repeat = abs(metric_at(torch.zeros(count)) - value)
        near = [metric_at(d) + metric_at(-d) - 2 * value for d in directions[num_reweightings:] * radius / 100]
        directions = directions[:num_reweightings]
        changes = torch.tensor([changes_along(d) for d in directions], dtype=torch.float64)
        alone = [changes_along(torch.arange(count) == i) for i in probed]

    all_values = torch.tensor(values, dtype=torch.float64)
    is_single = bool((all_values == all_values.float()).all())
    digit = abs(value) * torch.finfo(torch.float32 if is_single else torch.float64).eps
    noise = max(digit, repeat, *(abs(d) / 2 for d in near))
    size = gradients.square().mean().sqrt().item()
    predicted, odd = radius * directions @ gradients, (changes[:, 0] - changes[:, 3]) / 2
    total, on_lines = changes.square().sum(), (changes @ SHIFTS).square().sum() / SHIFTS.square().sum()
    result = MetagradientCheck(
        verdict="passed",
        advice=[],
        correlation=_ratio(predicted @ odd, predicted.norm() * odd.norm()),
        slope=_ratio(predicted @ odd, predicted @ predicted),
        r_squared=1 - _ratio((changes - predicted[:, None] * SHIFTS).square().sum(), total),
        smoothness=1 - max(1 - _ratio(on_lines, total), 0.0) ** 0.5,
        noise=noise,
        metric_before=out.metric_before,
        metric_after=out.metric_after,
        adam_epsilon_root=out.adam_epsilon_root,
        radius=radius,
        probes=[_probe(i, gradients[i].item(), c, radius, noise, size) for i, c in zip(probed, alone, strict=True)],
        predicted=predicted.tolist(),
        changes=changes.tolist(),
    )

    probes, signal = result.probes, odd.square().mean().sqrt().item()
    judged = signal > 0 and noise <= MAX_NOISE * signal
    smooth = result.smoothness >= MIN_SMOOTHNESS
    matched = result.correlation >= MIN_CORRELATION and abs(result.slope - 1) <= SLOPE_TOLERANCE
    wrong = any(p.verdict == "disagrees" for p in probes) or (judged and not (smooth and matched))
    params = [p.detach() for p in model.parameters() if p.requires_grad]
    spacing = torch.finfo(params[0].dtype).eps * sum(p.norm(1).item() for p in params) / sum(p.numel() for p in params)
    if wrong and args.optim == "adamw" and args.learning_rate < MIN_SPACINGS * spacing:
        result.verdict = "inconclusive"
        result.advice.append(
            f"`learning_rate` {args.learning_rate:.3g} is only {args.learning_rate / spacing:.1f} spacings of floating-point "
            "numbers at the mean size of the trained parameters: steps are rounded. Raise it, or check `model.double()`."
        )
    elif wrong:
        result.verdict = "failed"
        square = out.adam_epsilon_root
        if args.optim == "adamw" and args.adam_epsilon_root != "auto":
            first = [examples[i] for i in next(args.batches(count))]
            once = replace(quiet, adam_epsilon_root="auto", num_train_epochs=1)
            square = compute_metagradients(model, first, metric, once, accelerator).adam_epsilon_root
        result.advice = _remedies(result, args, square, out.losses, smooth)
    elif not judged or all(p.verdict == "unclear" for p in probes):
        result.verdict = "inconclusive"
        if judged and all(p.step_error > p.rounding_error for p in probes):
            remedy = "The finite differences depend on their step, though: lower `radius`."
        elif repeat > 4 * digit:
            remedy = "Two equal runs differ: make model and metric deterministic, or raise `radius`."
        elif noise <= 4 * digit:
            remedy = "This is the last digit of its value: compute it in float64 (`.double()` before sums), or raise `radius`."
        else:
            remedy = "The run's own rounding does that: check `model.double()`, or raise `radius`."
        result.advice.append(
            f"The metric is uncertain by {noise:.1e} and re-weighting moves it by {signal:.1e}. {remedy}"
        )
    return result


def _remedies(
    result: MetagradientCheck, args: TargetTrainingArguments, square: float, losses, smooth: bool
) -> list[str]:
    advice = []
    if args.optim == "adamw" and result.adam_epsilon_root < 0.01 * square:
        advice.append(
            f'`adam_epsilon_root` {result.adam_epsilon_root:.3g} is far below the {square:.1e} that "auto" would take: '
            "AdamW's step is little more than the gradient's sign, which jumps. Set it to \"auto\"."
        )
    diverges = losses[-1] > 1.2 * losses[0]
    if diverges or not (smooth or advice):
        advice.append(
            f"The metric is not smooth in the examples' weights (smoothness {result.smoothness:.2f})"
            + (f", and the loss rose from {losses[0]:.3g} to {losses[-1]:.3g}" if diverges else "")
            + f". Lower `learning_rate` {args.learning_rate:g}, take fewer steps or set `max_grad_norm`. A smaller `radius` shows "
            "how far metagradients hold."
        )
    return advice or [
        "The metric is smooth, but its slope is not what metagradients say. If the gradient of `metric` is that of its value "
        "(no `detach`, no rounding; see `torch.autograd.gradcheck`), check `model.double()`, then report a bug."
    ]


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """0 where nothing moved."""
    return (numerator / denominator).item() if denominator > 0 else 0.0


def _probe(example: int, predicted: float, changes: list[float], radius: float, noise: float, size: float) -> Probe:
    full, half = (changes[0] - changes[3]) / (2 * radius), (changes[1] - changes[2]) / radius
    measured, step_error, rounding_error = (4 * half - full) / 3, abs(half - full), 4 * noise / radius
    scale, doubt = max(abs(measured), size), step_error + rounding_error
    verdict: Literal["agrees", "disagrees", "unclear"] = "agrees" if doubt <= 0.25 * scale else "unclear"
    if abs(measured - predicted) > doubt + PROBE_TOLERANCE * scale:
        verdict = "disagrees"
    return Probe(example, predicted, measured, step_error, rounding_error, verdict)
