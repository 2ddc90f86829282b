"""
Target metrics Φ: what the fine-tuned model is wanted to do well on.

A metric is any callable `metric(model) -> scalar tensor` that is differentiable in the model's parameters; higher is
better. Optional are `setup(model)`, called on the original model before each fine-tuning run, `readouts(model) ->
dict[str, float]`, called on the fine-tuned model for numbers a person can read, and `state()` with `load_state(state)`, for
what should survive a checkpoint.

Beside the metrics, [`decode_pattern`] reads a pattern back from two checkpoints and [`evaluate_texts`] looks at what a
generator writes.
"""

from .decode import decode_pattern
from .likelihood import LanguageModelingLikelihood
from .norm import LMHeadNorm
from .pattern import LMHeadPattern
from .texts import evaluate_texts


__all__ = ["LMHeadNorm", "LMHeadPattern", "LanguageModelingLikelihood", "decode_pattern", "evaluate_texts"]
