"""What a run returns."""

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
        adam_epsilon_root (`float`): The value used, which is of interest where `"auto"` was asked for.
        micro_batch_size (`int`, *optional*):
            That of the arguments, or what was left of it after memory ran out. Worth passing on to the next run.
        losses (`list[float]`): Training loss of each step.
        readouts (`dict[str, float]`): What the metric's `readouts` returned on the fine-tuned model; empty without one.
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
            in the order of `examples`. In units of the metric per unit of weight.
        token_metagradients (`list[Tensor]`):
            \\( \mathrm{d}\Phi / \mathrm{d} w_{ij} \\), the same for a weight of each token's loss: float32 tensors on the CPU, one
            an example, shape `(tokens,)`. They sum to `metagradients`. Position j belongs to `input_ids[j]`; it is 0 for the
            first token, for tokens that are not supervised and beyond `max_length`.
        candidate_metagradients (`list[Tensor]`, *optional*):
            What the metric would gain if other tokens stood there: the derivative, at 0, in the weight of an added loss term
            \\( -\log p(v \mid x_{<j}) / Z_t \\) for each of the example's `"candidates"`, shape `(tokens, k)`; 0 where there is
            none. `None` where no example has candidates.
        plan ([`~trl_dpg.metagradients.runtime.memory.MemoryPlan`]):
            Where the tape was, and how large; `None` for a run of one step, which needs no tape.
        curvature_errors (`list[float]`):
            Estimated relative error of each step's central difference; 0.0 for a step that was repeated exactly, and empty with
            `curvature="exact"`.
        num_exact_fallbacks (`int`): Steps that were repeated exactly, as their estimate was above `curvature_tolerance`.
    """

    metagradients: Tensor
    token_metagradients: list[Tensor]
    candidate_metagradients: list[Tensor] | None = None
    plan: MemoryPlan | None = None
    curvature_errors: list[float] = field(default_factory=list)
    num_exact_fallbacks: int = 0
