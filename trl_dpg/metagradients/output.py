"""Results of a run."""

from dataclasses import dataclass, field

from torch import Tensor

from .runtime.memory import MemoryPlan


@dataclass(kw_only=True)
class TrainingOutput:
    r"""
    Result of [`train_and_measure`].

    Attributes:
        metric_before (`float`): \\( \Phi \\) of the original model.
        metric_after (`float`): \\( \Phi \\) of the fine-tuned model.
        adam_epsilon_root (`float`): The value that was used. With `"auto"`, it is the measured value.
        micro_batch_size (`int`, *optional*):
            Value of the arguments, or a smaller one after memory ran out. Pass it to the next run, which then need not search for it.
        losses (`list[float]`): Training loss of each step.
        readouts (`dict[str, float]`): Result of the metric's `readouts` on the fine-tuned model; empty if it has no such method.
    """

    metric_before: float
    metric_after: float
    adam_epsilon_root: float
    micro_batch_size: int | None = None
    losses: list[float] = field(default_factory=list)
    readouts: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class MetagradientOutput(TrainingOutput):
    r"""
    Result of [`compute_metagradients`].

    Attributes, beside those of [`TrainingOutput`]:
        metagradients (`Tensor`):
            \\( \mathrm{d}\Phi / \mathrm{d} w_i \\) at the examples' weights, float32 on the CPU, shape `(len(examples),)`,
            in the order of `examples`. The unit is that of the metric per unit of weight.
        token_metagradients (`list[Tensor]`):
            \\( \mathrm{d}\Phi / \mathrm{d} w_{ij} \\), the same for a weight of each token's loss: float32 tensors on the CPU, one
            an example, shape `(tokens,)`. They sum to `metagradients`. Position j belongs to `input_ids[j]`; it is 0 for the
            first token, for tokens that are not supervised and beyond `max_length`.
        candidate_metagradients (`list[Tensor]`, *optional*):
            What the metric would gain if the example also taught another token at a position. For each of its `"candidates"`, a loss
            term \\( -\log p(v \mid x_{<j}) / Z_t \\) is added, and this is the derivative in its weight, at weight 0. Shape
            `(tokens, k)`; 0 where there is no candidate. `None` if no example has candidates.
        plan ([`~trl_dpg.metagradients.runtime.memory.MemoryPlan`]):
            Place and size of the tape; `None` for a run of one step, whose tape needs no extra memory.
        curvature_errors (`list[float]`):
            Estimated relative error of each step's central difference; 0.0 for a step that was repeated exactly, and empty with
            `curvature="exact"`.
        num_exact_fallbacks (`int`): Number of steps that were repeated exactly because their error was above `curvature_tolerance`.
    """

    metagradients: Tensor
    token_metagradients: list[Tensor]
    candidate_metagradients: list[Tensor] | None = None
    plan: MemoryPlan | None = None
    curvature_errors: list[float] = field(default_factory=list)
    num_exact_fallbacks: int = 0
