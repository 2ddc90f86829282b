"""The check of metagradients, which lies beside the engine that it uses."""

from ..checking import MetagradientCheck, check_metagradients


__all__ = ["MetagradientCheck", "check_metagradients"]
