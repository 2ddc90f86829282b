"""The ℓ2 metric, for making the LM head small."""

from typing import Any

import torch
from torch import nn

from ..metagradients.metric import Metric
from ..metagradients.runtime.host import float64_device
from .heads import lm_head_weight


class LMHeadNorm(Metric):
    r"""
    Negative norm of the LM head, Φ = −‖W‖₂ over all entries of W (the Frobenius norm): higher means smaller weights.

    Source: the ℓ2 experiment of Synthetic Data for any Differentiable Target (arXiv 2604.08423). The norm is computed in
    float64, because one fine-tuning run changes it by less than float32 resolves.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel

    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    >>> _ = model.lm_head.weight.data.fill_(0.5)
    >>> round(LMHeadNorm()(model).item(), 4)  # −√(16 · 8 · 0.25)
    -5.6569

    ```
    """

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Φ, shape `()`, in float64. Raises a [`ValueError`] if the model has no LM head."""
        weight = lm_head_weight(model)
        return -torch.linalg.vector_norm(weight.to(float64_device(weight.device)), dtype=torch.float64)

    @torch.no_grad()
    def readouts(self, model: nn.Module) -> dict[str, float]:
        """`lm_head_norm`, the norm itself."""
        return {"lm_head_norm": -self(model).item()}

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "effect": "the norm of its LM head becomes smaller",
            "description": "The negative ℓ2 norm of the LM head over all its entries.",
        }
