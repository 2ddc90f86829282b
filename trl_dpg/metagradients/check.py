"""Are metagradients right for this model, data, metric and recipe, and do they hold beyond a point? Measured by training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from torch import Tensor
from tqdm.auto import tqdm

from .compute import compute_metagradients, train_and_measure
from .diagnosis import SHIFTS, MetagradientCheck, Probe, advise_on_failure, advise_on_noise, judge
from .method.recipe import TargetTrainingArguments
from .output import MetagradientOutput, TrainingOutput
from .runtime.model import TargetModel


PROBE_TOLERANCE = 0.05  # of the slope measured, or of the root mean square of all metagradients where that is larger
MAX_DOUBT = 0.25  # of the same, beyond which a probe is unclear
NUM_NOISE_RUNS = 6
MIN_SPACINGS = 100  # of floating-point numbers in AdamW's learning rate, for a mismatch not to be put down to rounding


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

    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (num_reweightings + 2, len(examples)), generator=generator).double() * 2 - 1
    directions, nearby = radius * signs[:num_reweightings], radius * signs[num_reweightings:] / 100
    probed = _choose_probes(out.metagradients, num_probes, generator)
    moves = torch.cat([directions, radius * F.one_hot(probed, len(examples)).double()])
    shifts = torch.cat([_shifts_for_noise(nearby), (moves[:, None] * SHIFTS[:, None]).flatten(0, 1)])
    values = _measure(partial(fine_tune, args=recipe), examples, shifts, hidden)

    noise, remedy = _estimate_noise(values)
    changes = values[NUM_NOISE_RUNS:].view(-1, len(SHIFTS)) - values[0]
    result = _compare(out, directions, probed, changes, radius, noise)
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
    """Examples to move alone: the largest, and others at random."""
    largest = metagradients.abs().argsort(descending=True, stable=True)
    first, rest = largest.tensor_split([(min(number, len(largest)) + 1) // 2])
    return torch.cat([first, rest[torch.randperm(len(rest), generator=generator)[: number // 2]]])


def _measure(
    fine_tune: Callable[..., TrainingOutput],
    examples: Sequence[Mapping[str, Any]],
    shifts: Tensor,
    hidden: bool | None,
) -> Tensor:
    """Φ after fine-tuning with the weights moved by each row of `shifts`."""
    weights = torch.tensor([1.0 if e.get("weight") is None else float(e["weight"]) for e in examples]).double()
    values = []
    for moved in tqdm((weights + shifts).tolist(), desc="Check", leave=False, disable=hidden):
        shifted = [{**e, "weight": w} for e, w in zip(examples, moved, strict=True)]
        values.append(fine_tune(examples=shifted).metric_after)
    return torch.tensor(values, dtype=torch.float64)


def _shifts_for_noise(nearby: Tensor) -> Tensor:
    """No shift, twice, and both ways along two directions, where the curvature of a smooth Φ no longer counts."""
    return torch.cat([torch.zeros_like(nearby), torch.stack([nearby, -nearby], dim=1).flatten(0, 1)])


def _estimate_noise(values: Tensor) -> tuple[float, str]:
    """The standard error of a value of Φ, and what lowers it. The first values are those at [`_shifts_for_noise`]."""
    value, repeated, *near = values[:NUM_NOISE_RUNS].tolist()
    dtype = torch.float32 if torch.equal(values, values.float().double()) else torch.float64
    digit, repeat = abs(value) * torch.finfo(dtype).eps, abs(repeated - value)
    noise = max(digit, repeat, *(abs(a + b - 2 * value) / 2 for a, b in zip(near[::2], near[1::2], strict=True)))
    if repeat > 4 * digit:
        return noise, "Two equal runs differ: make model and metric deterministic"
    if noise <= 4 * digit:
        return noise, "This is the last digit of its value: compute it in float64 (`.double()` before sums)"
    return noise, "The run's own rounding does that: check `model.double()`"


def _compare(
    out: MetagradientOutput, directions: Tensor, probed: Tensor, changes: Tensor, radius: float, noise: float
) -> MetagradientCheck:
    """Every figure of the result."""
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
        adam_epsilon_root=out.adam_epsilon_root,
        radius=radius,
        probes=[_probe(example, gradient, c, radius, noise, size) for example, gradient, c in moved],
        predicted=predicted.tolist(),
        changes=changes.tolist(),
    )


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """0 where nothing moved."""
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
    """What may be behind a mismatch where AdamW's steps are hardly larger than the spacing of parameters."""
    params = [p.detach() for p in model.parameters() if p.requires_grad]
    spacing = torch.finfo(params[0].dtype).eps * sum(p.norm(1).item() for p in params) / sum(p.numel() for p in params)
    if args.optim != "adamw" or args.learning_rate >= MIN_SPACINGS * spacing:
        return None
    return (
        f"`learning_rate` {args.learning_rate:.3g} is only {args.learning_rate / spacing:.1f} spacings of floating-point "
        "numbers at the mean size of the trained parameters: steps are rounded. Raise it, or check `model.double()`."
    )


def _automatic_epsilon_root(
    fine_tune: Callable[..., TrainingOutput], examples: Sequence[Mapping[str, Any]], recipe: TargetTrainingArguments
) -> float:
    """What `adam_epsilon_root="auto"` comes to, from the first batch."""
    first = [examples[i] for i in next(recipe.batches(len(examples)))]
    once = replace(recipe, adam_epsilon_root="auto", num_train_epochs=1)
    return fine_tune(examples=first, args=once).adam_epsilon_root
