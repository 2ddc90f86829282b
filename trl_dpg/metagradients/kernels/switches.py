"""Settings that switch shortcuts off. They change nothing but the cost of a run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from ..runtime.model import is_checkpointed
from .gelu import closed_form_gelus
from .linear import WithoutWeightGradients


@dataclass
class Switches:
    """
    Which shortcuts a run takes.

    Attributes:
        logits_at_once (`float`): If there are more logits than this, they are computed in chunks. `math.inf` switches chunks off.
        chunk (`int`, *optional*): Logits of one chunk. `None` means a size that suits the device.
        graph_contexts (`tuple`): Functions of a model that return contexts. Forward passes for second-order graphs run in all of them.
    """

    logits_at_once: float = 1 << 21
    chunk: int | None = None
    graph_contexts: tuple[Callable[[nn.Module], AbstractContextManager], ...] = (
        closed_form_gelus,
        lambda model: WithoutWeightGradients(),
    )


SWITCHES = Switches()


@contextmanager
def switched(**changes) -> Iterator[None]:
    """Changes [`Switches`] inside a `with` block."""
    before = dict(vars(SWITCHES))
    vars(SWITCHES).update(changes)
    try:
        yield
    finally:
        vars(SWITCHES).update(before)


@contextmanager
def building_graph(model: nn.Module, bf16: bool) -> Iterator[None]:
    """
    Makes forward passes of a model build cheaper second-order graphs.

    It does nothing under autocast, where rounding must be that of the layers' own kernels. It does nothing with gradient checkpointing
    either, which must recompute exactly what was computed.
    """
    with ExitStack() as stack:
        for context in () if bf16 or is_checkpointed(model) else SWITCHES.graph_contexts:
            stack.enter_context(context(model))
        yield
