"""Dataset Policy Gradients for TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import quiet as _quiet  # noqa: F401 (must come before the imports whose warnings it drops)


if TYPE_CHECKING:
    from .config import DatasetPolicyGradientConfig
    from .rewards import MetagradientReward
    from .target import untie_lm_head
    from .trainer import DatasetPolicyGradientTrainer

__version__ = "0.1.0"

__all__ = ["DatasetPolicyGradientConfig", "DatasetPolicyGradientTrainer", "MetagradientReward", "untie_lm_head"]

_MODULES = {
    "DatasetPolicyGradientConfig": "config",
    "DatasetPolicyGradientTrainer": "trainer",
    "MetagradientReward": "rewards",
    "untie_lm_head": "target",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used. `trl-dpg --help` and the engine need no TRL, which takes seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
