"""Checks by fine-tuning whether metagradients are right, and how far they hold, for a model, data, metric and recipe."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .compute import compute_metagradients, train_and_measure
from .method.recipe import TargetTrainingArguments
from .output import MetagradientOutput, TrainingOutput
from .runtime.model import TargetModel


SHIFTS = torch.tensor([1.0, 0.5, -0.5, -1.0], dtype=torch.float64)  # shifts of the weights, in radii
MIN_CORRELATION, SLOPE_TOLERANCE, MIN_SMOOTHNESS = 0.95, 0.1, 0.5
MAX_NOISE = 0.1  # largest noise for a verdict, as a share of the metric's change
PROBE_TOLERANCE = 0.05  # as a share of the probe's scale, see `_probe`
MAX_DOUBT = 0.25  # largest errors of a clear probe, as a share of the same scale
NUM_NOISE_RUNS = 6
MIN_SPACINGS = 100  # least AdamW learning rate, in spacings of floating-point numbers, that rules out rounding


@dataclass
class Probe:
    r"""
    Result for one example whose weight alone was moved, by ± the radius h and by ± h/2.

    `predicted` is the example's metagradient. `measured` is \\( (4 D(h/2) - D(h)) / 3 \\), where \\( D \\) is the central difference.
    `step_error` is \\( |D(h/2) - D(h)| \\). `rounding_error` is 4 noise / h, about three standard errors.
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

    The weights of all examples move by s radii along direction k, \\( s \in \{1, ½, -½, -1\} \\). Let \\( c_{ks} \\) be the measured
    change of Φ, and \\( p_k \\) the change that metagradients predict for \\( s = 1 \\). In \\( o_k = (c_{k,1} - c_{k,-1}) / 2 \\),
    curvature cancels. The verdict is

    - `"failed"` if a probe disagrees: its `predicted` and `measured` differ by more than its errors plus 5%.
    - `"failed"` also if `correlation` < 0.95, |`slope` − 1| > 0.1 or `smoothness` < 0.5, unless the noise is above 10% of the root
      mean square of \\( o \\).
    - `"inconclusive"` if the noise is above these 10%, or if every probe is unclear (its errors exceed 25%).
    - `"inconclusive"` instead of `"failed"` if rounding may explain the failure: AdamW's `learning_rate` is below 100 spacings of
      floating-point numbers at the mean size of the trained parameters.
    - `"passed"` otherwise.

    For a probe, 100% is its `measured`, or the root mean square of all metagradients if that is larger.

    Attributes:
        verdict (`str`): `"passed"`, `"failed"` or `"inconclusive"`.
        advice (`list[str]`): What to change or look into. Empty if the check passed.
        correlation (`float`): \\( \langle p, o \rangle / \lVert p \rVert \lVert o \rVert \\).
        slope (`float`): Measured over predicted change, \\( \langle p, o \rangle / \lVert p \rVert^2 \\).
        r_squared (`float`): \\( 1 - \sum (c_{ks} - s p_k)^2 / \sum c_{ks}^2 \\). Curvature lowers it.
        smoothness (`float`):
            \\( 1 - \sqrt{1 - \sum_k (\sum_s s c_{ks})^2 / (\sum_s s^2 \sum_{ks} c_{ks}^2)} \\): one minus the relative distance
            of the changes from a straight line along each direction. From 0 to 1, where 1 is perfectly linear. It does not
            depend on metagradients.
        noise (`float`):
            Standard error of a value of Φ. It is the largest of three: the last digit of Φ, the difference between two equal runs,
            and half the second difference at a hundredth of the radius. At that distance, a smooth Φ has no visible curvature.
        metric_before (`float`): Φ of the original model.
        metric_after (`float`): Φ of the fine-tuned model.
        metric_after_without_epsilon_root (`float`):
            Φ after the same run with `adam_epsilon_root` 0, as ordinary AdamW and validation have it. If it is far from `metric_after`,
            metagradients are right, but for another optimizer than that of ordinary fine-tuning.
        adam_epsilon_root (`float`): The value that was used.
        radius (`float`): How far weights were moved.
        probes (`list[Probe]`): Results for single examples.
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
    metric_after_without_epsilon_root: float
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
        """The whole result in types that JSON has."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"Metagradients: {self.verdict}",
            f"metric {self.metric_before:.7g} -> {self.metric_after:.7g}, noise {self.noise:.1e}, adam_epsilon_root {self.adam_epsilon_root:.3g}",
            f"metric without epsilon_root, as in ordinary fine-tuning: -> {self.metric_after_without_epsilon_root:.7g}",
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
        from ..reporting.plotting import plot_check  # imported here since the engine does not need Matplotlib

        plot_check(self, path)


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
    Compares metagradients with the measured effect of changing the examples' weights.

    Costs one call of [`compute_metagradients`] and 7 + 4 (`num_probes` + `num_reweightings`) plain fine-tuning runs. Values that
    the first run measures (`adam_epsilon_root="auto"`, a metric's automatic scale) are kept for the other runs.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`compute_metagradients`]. The same holds for `examples` (a part of the data is enough), `metric`, `args` and
            `accelerator`.
        num_probes (`int`, *optional*, defaults to `4`):
            Number of examples whose weight is moved alone. Half of them have the largest metagradients, half are random.
        num_reweightings (`int`, *optional*, defaults to `8`):
            Number of directions, with random signs, along which all weights are moved.
        radius (`float`, *optional*, defaults to `0.1`):
            How far weights are moved. Weights are 1 unless the examples set others.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of examples and directions.

    Raises:
        [`ValueError`]: If an argument is out of its range or cannot be used.
        [`FloatingPointError`]: If a run is not finite.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from trl_dpg.metagradients import check_metagradients

    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)).double()
    >>> examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
    >>> check_metagradients(model, examples, lambda model: -model.lm_head.weight.norm()).verdict
    'passed'

    ```
    """
    args = args or TargetTrainingArguments()
    for name, number in (("num_probes", num_probes), ("num_reweightings", num_reweightings)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if not 0 < radius < math.inf:
        raise ValueError(f"`radius` must be a finite number above 0, got {radius}. Weights are 1 by default: try 0.1.")
    hidden = True if accelerator is not None and accelerator.process_index != 0 else args.disable_tqdm
    recipe = replace(args, disable_tqdm=True)
    out = compute_metagradients(model, examples, metric, recipe, accelerator)
    recipe = replace(recipe, micro_batch_size=out.micro_batch_size, adam_epsilon_root=out.adam_epsilon_root)
    fine_tune = partial(train_and_measure, model, metric=metric, accelerator=accelerator)
    ordinary = fine_tune(examples=examples, args=replace(recipe, adam_epsilon_root=0.0)).metric_after

    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (num_reweightings + 2, len(examples)), generator=generator).double() * 2 - 1
    # Runs for the noise: two without a shift, and both ways along two directions, so short that a smooth Φ has no curvature there
    (one, other), directions = radius / 100 * signs[num_reweightings:], radius * signs[:num_reweightings]
    for_noise = torch.stack([0 * one, 0 * one, one, -one, other, -other])
    probed = _choose_probes(out.metagradients, num_probes, generator)
    moves = torch.cat([directions, radius * F.one_hot(probed, len(examples)).double()])
    shifts = torch.cat([for_noise, (moves[:, None] * SHIFTS[:, None]).flatten(0, 1)])
    values = _measure(partial(fine_tune, args=recipe), examples, shifts, hidden)

    noise, remedy = _estimate_noise(values)
    changes = values[NUM_NOISE_RUNS:].view(-1, len(SHIFTS)) - values[0]
    result = _compare(out, ordinary, directions, probed, changes, radius, noise)
    result.verdict = judge(result)
    if result.verdict == "inconclusive":
        result.advice = [advise_on_noise(result, remedy)]
    elif result.verdict == "failed" and (rounding := _rounding_of_steps(model, args)):
        result.verdict, result.advice = "inconclusive", [rounding]
    elif result.verdict == "failed":
        automatic = out.adam_epsilon_root
        if args.optim == "adamw" and args.adam_epsilon_root != "auto":
            automatic = _automatic_epsilon_root(fine_tune, examples, recipe)
        result.advice = advise_on_failure(result, args, automatic, out.losses)
    return result


def _choose_probes(metagradients: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Indices of the examples to move alone: those with the largest metagradients, and random others."""
    largest = metagradients.abs().argsort(descending=True, stable=True)
    first, rest = largest.tensor_split([(min(number, len(largest)) + 1) // 2])
    return torch.cat([first, rest[torch.randperm(len(rest), generator=generator)[: number // 2]]])


def _measure(
    fine_tune: Callable[..., TrainingOutput],
    examples: Sequence[Mapping[str, Any]],
    shifts: Tensor,
    hidden: bool | None,
) -> Tensor:
    """Φ after fine-tuning, once for each row of `shifts`, which is added to the weights."""
    weights = torch.tensor([1.0 if e.get("weight") is None else float(e["weight"]) for e in examples]).double()
    values = []
    for moved in tqdm((weights + shifts).tolist(), desc="Check", leave=False, disable=hidden):
        shifted = [{**e, "weight": w} for e, w in zip(examples, moved, strict=True)]
        values.append(fine_tune(examples=shifted).metric_after)
    return torch.tensor(values, dtype=torch.float64)


def _estimate_noise(values: Tensor) -> tuple[float, str]:
    """The standard error of a value of Φ, and advice on how to lower it."""
    value, repeated, *near = values[:NUM_NOISE_RUNS].tolist()
    dtype = torch.float32 if torch.equal(values, values.float().double()) else torch.float64
    digit, repeat = abs(value) * torch.finfo(dtype).eps, abs(repeated - value)
    noise = max(digit, repeat, *(abs(a + b - 2 * value) / 2 for a, b in zip(near[::2], near[1::2], strict=True)))
    if repeat > 4 * digit:
        return noise, "Two equal runs differ: make model and metric deterministic"
    if noise <= 4 * digit:
        return noise, "The noise is the metric's last digit: compute it in float64 (`.double()` before sums)"
    return noise, "The noise comes from rounding in the run: check `model.double()`"


def _compare(
    out: MetagradientOutput,
    ordinary: float,
    directions: Tensor,
    probed: Tensor,
    changes: Tensor,
    radius: float,
    noise: float,
) -> MetagradientCheck:
    """Computes all figures of the result."""
    gradients = out.metagradients.double()
    size = gradients.square().mean().sqrt().item()
    changes, alone = changes.split([len(directions), len(probed)])
    predicted, odd = directions @ gradients, (changes[:, 0] - changes[:, 3]) / 2
    total, on_lines = changes.square().sum(), (changes @ SHIFTS).square().sum() / SHIFTS.square().sum()
    moved = zip(probed.tolist(), gradients[probed].tolist(), alone.tolist(), strict=True)
    return MetagradientCheck(
        verdict="passed",
        advice=[],
        correlation=_ratio(predicted @ odd, predicted.norm() * odd.norm()),
        slope=_ratio(predicted @ odd, predicted @ predicted),
        r_squared=1 - _ratio((changes - predicted[:, None] * SHIFTS).square().sum(), total),
        smoothness=1 - max(1 - _ratio(on_lines, total), 0.0) ** 0.5,
        noise=noise,
        metric_before=out.metric_before,
        metric_after=out.metric_after,
        metric_after_without_epsilon_root=ordinary,
        adam_epsilon_root=out.adam_epsilon_root,
        radius=radius,
        probes=[_probe(example, gradient, c, radius, noise, size) for example, gradient, c in moved],
        predicted=predicted.tolist(),
        changes=changes.tolist(),
    )


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """The quotient, or 0 if nothing moved."""
    return (numerator / denominator).item() if denominator > 0 else 0.0


def _probe(example: int, predicted: float, changes: list[float], radius: float, noise: float, size: float) -> Probe:
    full, half = (changes[0] - changes[3]) / (2 * radius), (changes[1] - changes[2]) / radius
    measured, step_error, rounding_error = (4 * half - full) / 3, abs(half - full), 4 * noise / radius
    scale, doubt = max(abs(measured), size), step_error + rounding_error
    verdict: Literal["agrees", "disagrees", "unclear"] = "agrees" if doubt <= MAX_DOUBT * scale else "unclear"
    if abs(measured - predicted) > doubt + PROBE_TOLERANCE * scale:
        verdict = "disagrees"
    return Probe(example, predicted, measured, step_error, rounding_error, verdict)


def _rounding_of_steps(model: TargetModel, args: TargetTrainingArguments) -> str | None:
    """Advice if AdamW's steps are hardly larger than the spacing of floating-point numbers, which may explain a failure."""
    params = [p.detach() for p in model.parameters() if p.requires_grad]
    params = [p.to_local() if isinstance(p, DTensor) else p for p in params]  # a part is enough for the mean size
    spacing = torch.finfo(params[0].dtype).eps * sum(p.norm(1).item() for p in params) / sum(p.numel() for p in params)
    if args.optim != "adamw" or args.learning_rate >= MIN_SPACINGS * spacing:
        return None
    return (
        f"`learning_rate` {args.learning_rate:.3g} is only {args.learning_rate / spacing:.1f} spacings of floating-point "
        "numbers at the mean size of the trained parameters: steps are rounded. Raise `learning_rate`, or check `model.double()`."
    )


def _automatic_epsilon_root(
    fine_tune: Callable[..., TrainingOutput], examples: Sequence[Mapping[str, Any]], recipe: TargetTrainingArguments
) -> float:
    """The value that `adam_epsilon_root="auto"` takes from the first batch."""
    first = [examples[i] for i in next(recipe.batches(len(examples)))]
    once = replace(recipe, adam_epsilon_root="auto", num_train_epochs=1)
    return fine_tune(examples=first, args=once).adam_epsilon_root


def signal(result: MetagradientCheck) -> float:
    """Root mean square of the changes \\( o_k \\) of [`MetagradientCheck`], in which curvature cancels."""
    changes = torch.tensor(result.changes, dtype=torch.float64)
    return ((changes[:, 0] - changes[:, 3]) / 2).square().mean().sqrt().item()


def is_clear(result: MetagradientCheck) -> bool:
    """Whether moving the weights changes the metric by far more than its noise."""
    return signal(result) > 0 and result.noise <= MAX_NOISE * signal(result)


def judge(result: MetagradientCheck) -> Literal["passed", "failed", "inconclusive"]:
    """The verdict of [`MetagradientCheck`], without regard to rounded steps."""
    matched = result.correlation >= MIN_CORRELATION and abs(result.slope - 1) <= SLOPE_TOLERANCE
    verdicts = {probe.verdict for probe in result.probes}
    if "disagrees" in verdicts or (is_clear(result) and not (matched and result.smoothness >= MIN_SMOOTHNESS)):
        return "failed"
    return "passed" if is_clear(result) and verdicts != {"unclear"} else "inconclusive"


def advise_on_noise(result: MetagradientCheck, remedy: str) -> str:
    """Advice if the metric is too uncertain. `remedy` says how to lower the noise."""
    remedy += ", or raise `radius`."
    if is_clear(result) and all(p.step_error > p.rounding_error for p in result.probes):
        remedy = "The noise is low enough, but the finite differences depend on their step: lower `radius`."
    return f"The metric is uncertain by {result.noise:.1e}, and moving the weights changes it by {signal(result):.1e}. {remedy}"


def advise_on_failure(
    result: MetagradientCheck, args: TargetTrainingArguments, automatic: float, losses: list[float]
) -> list[str]:
    """Advice if metagradients failed. `automatic` is the value of `adam_epsilon_root="auto"`, `losses` are the losses of the steps."""
    advice = []
    if args.optim == "adamw" and result.adam_epsilon_root < 0.01 * automatic:
        advice.append(
            f'`adam_epsilon_root` {result.adam_epsilon_root:.3g} is far below the {automatic:.1e} that "auto" would take: '
            "AdamW's step is then little more than the gradient's sign, which is not smooth. Set `adam_epsilon_root` to \"auto\"."
        )
    diverges = losses[-1] > 1.2 * losses[0]
    if diverges or (result.smoothness < MIN_SMOOTHNESS and not advice):
        rise = f", and the loss rose from {losses[0]:.3g} to {losses[-1]:.3g}" if diverges else ""
        advice.append(
            f"The metric is not smooth in the examples' weights (smoothness {result.smoothness:.2f}){rise}. Lower "
            f"`learning_rate` {args.learning_rate:g}, take fewer steps or set `max_grad_norm`. Try a smaller `radius` to see how "
            "far metagradients hold."
        )
    return advice or [
        "The metric is smooth, but its slope is not what metagradients say. First check that the gradient of `metric` is right (no "
        "`detach`, no rounding; see `torch.autograd.gradcheck`). Then check `model.double()`. If that fails too, report a bug."
    ]
