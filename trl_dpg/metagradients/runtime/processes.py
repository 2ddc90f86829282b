"""Work split over processes: sums across them, and failures that end all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

from .memory import OutOfMemory, clear_frames, is_out_of_memory


TAIL = 64  # elements after the parameters in a gradient buffer: scalars that are summed over processes along with it


class Processes:
    """
    The processes that share a run, through Accelerate.

    Args:
        state ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`], *optional*):
            `None` for a run of this process alone, also where there are others.
    """

    def __init__(self, state: Accelerator | PartialState | None):
        self.index = 0 if state is None else state.process_index
        self.count = 1 if state is None else state.num_processes
        self._failure: Exception | None = None

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """
        Runs a block without collectives; if it raises on any process, raises on every process.

        A process that raised keeps its own exception. The others get a [`RuntimeError`] with the first cause (a
        [`FloatingPointError`] where all causes are such), instead of waiting forever in their next collective.
        """
        error = self._failure
        try:
            yield
        except Exception as e:
            error = error or e
        self._raise_any(error)

    @contextmanager
    def raising_later(self) -> Iterator[None]:
        """
        Runs a block without collectives; if it raises, so does the next `summing`, `gather` or block that fails together, on
        every process. What is computed until then is of no use.
        """
        try:
            yield
        except Exception as e:
            if self.count == 1:
                raise
            self._failure = self._failure or e

    @contextmanager
    def summing(self, buffer: Tensor, scalars: list[float]) -> Iterator[None]:
        """
        Runs a block that fills `buffer` and `scalars`; then both hold their sums over all processes, by one collective.

        Fails together like [`~Processes.failing_together`]: whether a process failed is summed along. `buffer` has shape
        `(n + TAIL,)`; `scalars` fit into the tail. Where nothing failed but that memory ran out, on one process or more, all
        of them raise [`~memory.OutOfMemory`].
        """
        error = self._failure
        try:
            yield
        except Exception as e:
            if is_out_of_memory(e):
                clear_frames(e)
                e = OutOfMemory(str(e))
            error = error or e
        if self.count > 1:
            tail = buffer[-TAIL:]
            tail.zero_()
            tail[0] = error is not None
            tail[1 : len(scalars) + 1] = torch.tensor(scalars, dtype=buffer.dtype)
            if error is not None:
                buffer[:-TAIL] = 0
            torch.distributed.all_reduce(buffer)
            failures, *sums = tail[: len(scalars) + 1].tolist()
            scalars[:] = sums
            if failures == 0:
                return
        self._raise_any(error)

    def gather(self, *shards: Tensor) -> tuple[Tensor, ...]:
        """Whole tensors from every process's shards of shape `(n,)`, by one collective. Fails together."""
        if self.count == 1:
            return shards
        mine = torch.cat([*shards, shards[0].new_full((1,), self._failure is not None)])
        gathered = mine.new_empty(self.count * len(mine))
        torch.distributed.all_gather_into_tensor(gathered, mine)
        rows = gathered.view(self.count, -1)
        if rows[:, -1].any():
            self._raise_any(self._failure)
        parts = rows[:, :-1].view(self.count, len(shards), -1)
        return tuple(parts[:, i].reshape(-1) for i in range(len(shards)))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_float(self, number: float, device: torch.device) -> float:
        """Sum over all processes."""
        return self.sum_(torch.tensor(number, dtype=torch.float64, device=device)).item()

    def _raise_any(self, error: Exception | None) -> None:
        if self.count > 1:
            message = f"{type(error).__name__} on process {self.index}: {error}"
            kind = next((kind for kind in (OutOfMemory, FloatingPointError) if isinstance(error, kind)), RuntimeError)
            failures = gather_object([] if error is None else [(message, kind)])
            causes = [cause for cause in failures if cause[1] is not OutOfMemory]
            if failures and not causes:
                raise OutOfMemory(failures[0][0])
            if causes and (error is None or isinstance(error, OutOfMemory)):
                kind = FloatingPointError if all(kind is FloatingPointError for _, kind in causes) else RuntimeError
                raise kind(f"The run ends because another process failed. {causes[0][0]}")
        if error is not None:
            raise error


def failing_together(state: Accelerator | PartialState | None):
    """[`~Processes.failing_together`] of the processes of `state`."""
    return Processes(state).failing_together()
