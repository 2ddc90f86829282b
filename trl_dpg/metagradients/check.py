"""The check of metagradients by measurement, under the name that users of the engine look for it."""

from ..checking import MetagradientCheck, check_metagradients


__all__ = ["MetagradientCheck", "check_metagradients"]
