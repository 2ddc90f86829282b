"""
Target metrics Φ: goals that the fine-tuned model should score high on.

A metric is any callable `metric(model) -> scalar tensor` that is differentiable in the model's parameters. Higher is better.
A subclass of [`Metric`] can do more. Its methods have defaults: `setup(model)` is called on the original model before each run,
`readouts(model)` returns numbers that a person understands, `describe()` says what the metric is for.

Metrics can be added and scaled: `a + 0.1 * b`. [`KeepBelow`] and [`KeepAbove`] are conditions to add to a goal. [`as_metric`] makes a
[`Metric`] of a plain function.

Two functions are no metrics: [`decode_pattern`] reads a pattern back from two checkpoints, and [`evaluate_texts`] evaluates the texts of
a generator.
"""

from ..metagradients.metric import Metric, WeightedSum, as_metric
from .conditions import KeepAbove, KeepBelow
from .decode import decode_pattern
from .likelihood import LanguageModelingLikelihood, Perplexity
from .lm_eval import LMEvalLikelihood
from .norm import LMHeadNorm
from .pattern import LMHeadPattern
from .preference import PreferenceMargin
from .texts import evaluate_texts


__all__ = [
    "KeepAbove",
    "KeepBelow",
    "LMEvalLikelihood",
    "LMHeadNorm",
    "LMHeadPattern",
    "LanguageModelingLikelihood",
    "Metric",
    "Perplexity",
    "PreferenceMargin",
    "WeightedSum",
    "as_metric",
    "decode_pattern",
    "evaluate_texts",
]
