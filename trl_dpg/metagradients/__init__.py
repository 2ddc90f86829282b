"""Exact metagradients of fine-tuning runs. Usable without TRL."""

from .check import MetagradientCheck, check_metagradients
from .compute import MetagradientOutput, TrainingOutput, compute_metagradients, train_and_measure
from .method.recipe import TargetTrainingArguments


__all__ = [
    "MetagradientCheck",
    "MetagradientOutput",
    "TargetTrainingArguments",
    "check_metagradients",
    "compute_metagradients",
    "TrainingOutput",
    "train_and_measure",
]
