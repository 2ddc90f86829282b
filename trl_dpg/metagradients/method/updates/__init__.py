"""Update rules of optimizers, each with its adjoint."""

from .adamw import AdamW
from .muon import Muon
from .sgd import SGD
from .update import Update


UPDATES: dict[str, type[Update]] = {"adamw": AdamW, "sgd": SGD, "muon": Muon}

__all__ = ["UPDATES", "AdamW", "Muon", "SGD", "Update"]
