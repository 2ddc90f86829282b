"""Rewards that TRL's trainers can call."""

from .metagradient import MetagradientReward


__all__ = ["MetagradientReward"]
