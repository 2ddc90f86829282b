"""Work split over processes: sums across them, and failures that end all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

from .memory import ANOTHER_FAILED, OutOfMemory, clear_frames, is_out_of_memory


class Processes:
    """The processes that share a run, through Accelerate; with `None` this one alone, also where there are others."""

    def __init__(self, state: Accelerator | PartialState | None):
        self.index = 0 if state is None else state.process_index
        self.count = 1 if state is None else state.num_processes
        self.device = None if state is None else state.device  # of collectives
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
        Runs a block without collectives; if it raises, so does the next collective or block that fails together, on every process.
        What is computed until then is of no use.
        """
        try:
            yield
        except Exception as e:
            if self.count == 1:
                raise
            self._failure = self._failure or e

    @contextmanager
    def summing_over_processes(self, buffer: Tensor | None, scalars: list[float]) -> Iterator[None]:
        """
        Runs a block that fills `buffer`, if there is one, and `scalars`; then both hold their sums over all processes.

        Fails together like [`~Processes.failing_together`]. Where nothing failed but that memory ran out, on one process or
        more, all of them raise [`~memory.OutOfMemory`].
        """
        error = self._failure
        try:
            yield
        except Exception as e:
            if is_out_of_memory(e):
                clear_frames(e)
                e = OutOfMemory(str(e))
            error = error or e
        self._sum_scalars(scalars, error)
        if buffer is not None:
            self.sum_(buffer)

    def gather(self, shard: Tensor) -> Tensor:
        """The whole tensor from every process's shard of shape `(n,)`. Fails together."""
        if self.count == 1:
            return shard
        with self.raising_later():
            whole = shard.new_empty(self.count * len(shard))
        self._sum_scalars([], self._failure)
        torch.distributed.all_gather_into_tensor(whole, shard)
        return whole

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_float(self, number: float) -> float:
        """Sum over all processes. Fails together."""
        scalars = [number]
        self._sum_scalars(scalars, self._failure)
        return scalars[0]

    def _sum_scalars(self, scalars: list[float], error: Exception | None) -> None:
        """Sums, in place and in float64, whether a process failed along with them."""
        if self.count > 1:
            sums = torch.tensor([error is not None, *scalars], dtype=torch.float64, device=self.device)
            failures, *scalars[:] = self.sum_(sums).tolist()
            if failures == 0:
                return
        self._raise_any(error)

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
                raise kind(f"{ANOTHER_FAILED} {causes[0][0]}")
        if error is not None:
            raise error


def failing_together(state: Accelerator | PartialState | None):
    """[`~Processes.failing_together`] of the processes of `state`."""
    return Processes(state).failing_together()
