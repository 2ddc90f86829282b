"""Rewards that TRL's trainers can call."""

from .base import TargetReward
from .baselines import EditDistanceReward, EmbeddingSimilarityReward, LanguageIdentificationReward, text_reward
from .metagradient import MetagradientReward
from .naive import NaiveReward


__all__ = [
    "EditDistanceReward",
    "EmbeddingSimilarityReward",
    "LanguageIdentificationReward",
    "MetagradientReward",
    "NaiveReward",
    "TargetReward",
    "text_reward",
]
