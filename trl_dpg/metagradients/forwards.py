"""Other forward passes for some modules of a model, for a while."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], replace: Callable[[Any], Any]) -> Iterator[None]:
    """Gives each module `replace(module.forward)` as its `forward`, and puts back what was there."""
    hooked = [module.__dict__.get("forward") for module in modules]  # Accelerate's hooks replace it on the instance
    for module in modules:
        module.forward = replace(module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(modules, hooked, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward  # type: ignore[method-assign]
