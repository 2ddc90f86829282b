"""Exact metagradients of fine-tuning runs. Usable without TRL."""

from .api import MetagradientOutput, compute_metagradients
from .arguments import TargetTrainingArguments


__all__ = ["MetagradientOutput", "TargetTrainingArguments", "compute_metagradients"]
