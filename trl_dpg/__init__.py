"""Dataset Policy Gradients for TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import DatasetPolicyGradientConfig
    from .rewards import MetagradientReward
    from .target import untie_lm_head
    from .trainer import DatasetPolicyGradientTrainer


__version__ = "0.1.0"

__all__ = ["DatasetPolicyGradientConfig", "DatasetPolicyGradientTrainer", "MetagradientReward", "untie_lm_head"]

_MODULES = dict(zip(__all__, (".config", ".trainer", ".rewards", ".target"), strict=True))


def __getattr__(name: str) -> Any:
    """Imports what is asked for: TRL's trainer imports vLLM where it is installed, which takes seconds and the engine needs neither."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
