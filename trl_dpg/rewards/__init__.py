"""Rewards that TRL's trainers can call."""

from .base import TargetReward, TargetTraining, check_metric, measuring_nothing
from .baselines import EditDistanceReward, EmbeddingSimilarityReward, LanguageIdentificationReward
from .metagradient import MetagradientReward
from .naive import NaiveReward


__all__ = [
    "EditDistanceReward",
    "EmbeddingSimilarityReward",
    "LanguageIdentificationReward",
    "MetagradientReward",
    "NaiveReward",
    "TargetReward",
    "TargetTraining",
    "check_metric",
    "measuring_nothing",
]
