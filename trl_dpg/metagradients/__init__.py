"""Exact metagradients of fine-tuning runs. Usable without TRL."""

from .check import MetagradientCheck, check_metagradients
from .compute import compute_metagradients, train_and_measure
from .method.recipe import TargetTrainingArguments
from .output import MetagradientOutput, TrainingOutput


__all__ = [
    "MetagradientCheck",
    "MetagradientOutput",
    "TargetTrainingArguments",
    "check_metagradients",
    "compute_metagradients",
    "TrainingOutput",
    "train_and_measure",
]
