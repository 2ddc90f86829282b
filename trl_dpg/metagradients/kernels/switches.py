"""Settings that switch each shortcut off. Nothing but the cost of a run changes."""

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
        logits_at_once (`float`): More logits than this are computed in chunks; `math.inf` switches that off.
        chunk (`int`, *optional*): Logits of one chunk. `None` is what suits the device.
        graph_contexts (`tuple`): Contexts, each of a model, that forward passes run in where a second-order graph is built.
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
    """Changes [`Switches`] for a while."""
    before = dict(vars(SWITCHES))
    vars(SWITCHES).update(changes)
    try:
        yield
    finally:
        vars(SWITCHES).update(before)


@contextmanager
def building_graph(model: nn.Module, bf16: bool) -> Iterator[None]:
    """
    Has forward passes of a model build second-order graphs that cost less.

    Not under autocast, where a layer's own kernel does the rounding. Not with checkpoints, which must recompute what was computed.
    """
    with ExitStack() as stack:
        for context in () if bf16 or is_checkpointed(model) else SWITCHES.graph_contexts:
            stack.enter_context(context(model))
        yield
