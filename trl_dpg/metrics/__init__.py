"""
Target metrics Φ: what the fine-tuned model is wanted to do well on.

A metric is any callable `metric(model) -> scalar tensor` that is differentiable in the model's parameters; higher is
better. One that says more about itself is a subclass of [`Metric`], whose methods have defaults: `setup(model)` is called on the
original model before each run, `readouts(model)` gives numbers that a person can read, `describe()` says what is wanted.

They add and scale: `a + 0.1 * b`. [`KeepBelow`] and [`KeepAbove`] are conditions to add to a goal. [`as_metric`] makes a [`Metric`] of a
plain function.

Beside the metrics, [`decode_pattern`] reads a pattern back from two checkpoints and [`evaluate_texts`] looks at what a
generator writes.
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
