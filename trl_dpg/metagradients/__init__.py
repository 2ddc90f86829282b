"""Exact metagradients of fine-tuning runs. Usable without TRL."""

from .api import MetagradientOutput, TrainingOutput, compute_metagradients, train_and_measure
from .arguments import TargetTrainingArguments
from .check import MetagradientCheck, check_metagradients


__all__ = [
    "MetagradientCheck",
    "MetagradientOutput",
    "TargetTrainingArguments",
    "check_metagradients",
    "compute_metagradients",
    "TrainingOutput",
    "train_and_measure",
]
