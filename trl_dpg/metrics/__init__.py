"""
Target metrics Φ: what the fine-tuned model is wanted to do well on.

A metric is any callable `metric(model) -> scalar tensor` that is differentiable in the model's parameters; higher is
better. One that says more about itself is a subclass of [`Metric`], whose methods have defaults: `setup(model)` is called on the
original model before each run, `readouts(model)` gives numbers that a person can read, `describe()` says what is wanted.

Beside the metrics, [`decode_pattern`] reads a pattern back from two checkpoints and [`evaluate_texts`] looks at what a
generator writes.
"""

from ..metagradients.metric import Metric
from .decode import decode_pattern
from .likelihood import LanguageModelingLikelihood
from .norm import LMHeadNorm
from .pattern import LMHeadPattern
from .texts import evaluate_texts


__all__ = ["LMHeadNorm", "LMHeadPattern", "LanguageModelingLikelihood", "Metric", "decode_pattern", "evaluate_texts"]
