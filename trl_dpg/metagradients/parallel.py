"""Work split over processes: sums across them, and failures that end all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor


@contextmanager
def failing_together(state: Accelerator | PartialState | None) -> Iterator[None]:
    """
    Runs a block without collectives; if it raises on any process, raises on every process.

    A process that raised keeps its own exception. The others get a [`RuntimeError`] with the first cause, instead of
    waiting forever in their next collective.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    if state is not None and state.num_processes > 1:
        message = None if error is None else f"{type(error).__name__} on process {state.process_index}: {error}"
        messages = [m for m in gather_object([message]) if m is not None]
        if error is None and messages:
            raise RuntimeError(f"The run ends because another process failed. {messages[0]}")
    if error is not None:
        raise error


def sum_over_processes(tensors: list[Tensor], state: Accelerator | PartialState | None) -> list[Tensor]:
    """Sums each tensor over all processes, in one collective."""
    if state is None or state.num_processes == 1:
        return tensors
    flat = reduce(torch.cat([t.reshape(-1) for t in tensors]), "sum")
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
