"""Work that is split over processes: sums across processes, and errors that end all of them together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

from .memory import ANOTHER_FAILED, OutOfMemory, clear_frames, is_out_of_memory


class Processes:
    """
    The processes of Accelerate that share a run. With `None`, the run belongs to this process alone, even if there are others.

    Every collective begins with [`~Processes.agree`]. So an error on one process ends all processes, at any point of the run.

    Attributes:
        in_step (`bool`):
            Whether the processes share one model in shards. All of them must then make the same calls of the model. Its gradients are
            already summed over the processes.
    """

    def __init__(self, state: Accelerator | PartialState | None):
        self.index = 0 if state is None else state.process_index
        self.count = 1 if state is None else state.num_processes
        self.device = None if state is None else state.device  # device of the tensors in collectives
        self.in_step = False
        self._failure: Exception | None = None

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """
        Runs a block. If the block raises on any process, every process raises.

        A process on which the block raised keeps its own exception. The others raise a [`RuntimeError`] with the first cause, or a
        [`FloatingPointError`] if all causes are of that type. Otherwise they would wait forever in their next collective.
        """
        error = None
        try:
            yield
        except Exception as e:
            if _is_agreed(e):
                raise
            error = e
        self.agree(error)

    @contextmanager
    def raising_later(self) -> Iterator[None]:
        """
        Runs a block that has no collective in it. If the block raises, the next collective or [`~Processes.failing_together`] raises on
        every process. Results in between are useless.
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
        Runs a block that fills `scalars`, and `buffer` if there is one. Afterwards both hold their sums over all processes.

        Errors are handled as in [`~Processes.failing_together`]. If the only error was that memory ran out on some process, every
        process raises [`~memory.OutOfMemory`].
        """
        with self.failing_together():
            try:
                yield
            except Exception as e:
                if _is_agreed(e) or not is_out_of_memory(e):
                    raise
                clear_frames(e)
                raise OutOfMemory(str(e)) from None
        self._sum_scalars(scalars)
        if buffer is not None and not self.in_step:
            self.sum_(buffer)

    def gather(self, shard: Tensor) -> Tensor:
        """Gathers the whole tensor from every process's shard of shape `(n,)`. An error on one process ends all of them."""
        if self.count == 1:
            return shard
        with self.raising_later():
            whole = shard.new_empty(self.count * len(shard))
        self.agree()
        torch.distributed.all_gather_single(whole, shard)
        return whole

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_float(self, number: float) -> float:
        """Sums a number over all processes. An error on one process ends all of them."""
        scalars = [number]
        self.agree()
        self._sum_scalars(scalars)
        return scalars[0]

    def agree(self, error: Exception | None = None, place: int = -1) -> None:
        """
        Raises on every process if one of them has an error, or if they are about to exchange different parameters.

        Args:
            error (`Exception`, *optional*): Error on this process, unless an earlier one is still pending.
            place (`int`): Index of the parameter that the processes exchange next; -1 outside of calls of the model.
        """
        error = self._failure or error
        if self.count > 1:
            sums = torch.tensor([error is not None, place, place**2], dtype=torch.float64, device=self.device)
            failures, places, squares = self.sum_(sums).tolist()
            if failures == 0 and places**2 == self.count * squares:
                return
            if failures == 0:
                error = RuntimeError(
                    "The processes share one model in shards, but each was about to read another parameter: the model uses different "
                    "parameters for different examples, as some mixtures of experts do. Do not shard the target (`target_fsdp=False` "
                    "in the trainer)."
                )
        self._raise_any(error)

    def _sum_scalars(self, scalars: list[float]) -> None:
        """Sums numbers over all processes, in place and in float64."""
        if self.count > 1 and scalars:
            scalars[:] = self.sum_(torch.tensor(scalars, dtype=torch.float64, device=self.device)).tolist()

    def _raise_any(self, error: Exception | None) -> None:
        if self.count > 1:
            message = f"{type(error).__name__} on process {self.index}: {error}"
            kind = next((kind for kind in (OutOfMemory, FloatingPointError) if isinstance(error, kind)), RuntimeError)
            failures = gather_object([] if error is None else [(message, kind)])
            causes = [cause for cause in failures if cause[1] is not OutOfMemory]
            if failures and not causes:
                error = OutOfMemory(failures[0][0])
            elif causes and (error is None or isinstance(error, OutOfMemory)):
                kind = FloatingPointError if all(kind is FloatingPointError for _, kind in causes) else RuntimeError
                error = kind(f"{ANOTHER_FAILED} {causes[0][0]}")
            if error is not None:
                error.is_agreed = True  # type: ignore[attr-defined]
        if error is not None:
            raise error


def _is_agreed(error: BaseException | None) -> bool:
    """Whether all processes raise this error already, or one that it was raised from. Then blocks around it need no exchange."""
    while error is not None and not hasattr(error, "is_agreed"):
        error = error.__cause__ or error.__context__
    return error is not None


def failing_together(state: Accelerator | PartialState | None):
    """[`~Processes.failing_together`] for the processes of `state`."""
    return Processes(state).failing_together()
