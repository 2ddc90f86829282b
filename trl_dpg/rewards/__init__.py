"""Rewards that TRL's trainers can call."""

from .metagradient import MetagradientReward, check_metric


__all__ = ["MetagradientReward", "check_metric"]
