"""The seam of all shortcuts: each can be switched off, and nothing but the cost of a run changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Switches:
    """
    Which shortcuts a run takes.

    Attributes:
        logits_at_once (`int` or `float`):
            More logits than this are computed in chunks (`chunked_head`). `math.inf` switches chunks off.
        chunk (`int`, *optional*):
            Logits of one chunk. `None` is what suits the device.
        linear (`bool`):
            Whether second-order graphs leave out the gradients of linear layers' weights (`linear`).
    """

    logits_at_once: float = 1 << 21
    chunk: int | None = None
    linear: bool = True


SWITCHES = Switches()


@contextmanager
def switched(**changes) -> Iterator[None]:
    """Changes [`Switches`] for a while."""
    before = {field.name: getattr(SWITCHES, field.name) for field in fields(SWITCHES)}
    vars(SWITCHES).update(changes)
    try:
        yield
    finally:
        vars(SWITCHES).update(before)
