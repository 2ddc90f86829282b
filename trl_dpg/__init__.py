"""Dataset Policy Gradients for TRL."""

from .config import DatasetPolicyGradientConfig
from .rewards import MetagradientReward
from .target import untie_lm_head
from .trainer import DatasetPolicyGradientTrainer


__version__ = "0.1.0"

__all__ = ["DatasetPolicyGradientConfig", "DatasetPolicyGradientTrainer", "MetagradientReward", "untie_lm_head"]
