"""Storage of the tape: in the device's memory, in the host's memory, or on disk."""

import os
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from .host import host_memory, tape_directory


AHEAD = 4  # number of tensors that are fetched while the caller computes
Place = tuple[int, torch.Size, torch.dtype]  # place of a tensor in a file: offset, shape, type


class Storage:
    """
    Keeps flat tensors, most of them of the same size. This base class keeps them in the device's own memory, without a copy.

    After `put`, the caller must not write to the tensors. If the storage `copies`, the caller may write to them again after `settle`.
    `stream` yields the tensors of keys in order, and fetches the next ones meanwhile. The caller may write to such a tensor
    only if it drops the key. `expect` announces the keys of the next `stream`.
    """

    copies = False

    def put(self, tensors: list[Tensor]) -> list[Any]:
        return tensors

    def settle(self) -> None:
        pass

    def expect(self, keys: list[Any]) -> None:
        pass

    def stream(self, keys: list[Any]) -> Iterator[Tensor]:
        return iter(keys)

    def drop(self, keys: list[Any]) -> None:
        pass

    def close(self) -> None:
        pass


def open_storage(location: str, directory: str | None, device: torch.device) -> Storage:
    """Storage at `"device"`, `"host"` or `"disk"`. For a model on the CPU, host and device are the same."""
    if location == "disk":
        return DiskStorage(tape_directory(directory), device)
    if location == "host" and device.type == "cuda":
        return HostStorage(device)
    return Storage()


class HostStorage(Storage):
    """Keeps tensors of a CUDA device in pinned host memory. Copies run on a stream of their own, in parallel to the computation."""

    copies = True

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device)
        self._kept: dict[int, Tensor] = {}
        self._next = 0
        self._leaving: list[Tensor] = []  # tensors of the last call of `put`, which copies may still be reading
        self._left = torch.cuda.Event()

    def put(self, tensors: list[Tensor]) -> list[int]:
        keys = []
        current = torch.cuda.current_stream(self.device)
        # At most one call's copies are under way. Otherwise, if the device lags behind the host, their sources would fill its memory.
        # A source is freed only for work that comes after its copy.
        current.wait_event(self._left)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            for tensor in tensors:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                kept.copy_(tensor, non_blocking=True)
                self._kept[self._next] = kept
                keys.append(self._next)
                self._next += 1
            self._left.record(self.side)
        self._leaving = tensors
        return keys

    def settle(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._left)
        self._leaving = []

    def stream(self, keys: list[int]) -> Iterator[Tensor]:
        self.settle()
        current = torch.cuda.current_stream(self.device)
        try:
            for tensor, fetched in _ahead(self._fetch, keys):
                current.wait_event(fetched)
                yield tensor
        finally:  # also if the caller stops early: memory must not be reused before the copies into it end
            current.wait_stream(self.side)

    def _fetch(self, key: int) -> tuple[Tensor, torch.cuda.Event]:
        # This memory belongs to the computing stream, which may still be reading its old contents, so the copy waits.
        tensor = torch.empty_like(self._kept[key], device=self.device)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            tensor.copy_(self._kept[key], non_blocking=True)
        return tensor, self.side.record_event()

    def drop(self, keys: list[int]) -> None:
        for key in keys:
            del self._kept[key]

    def close(self) -> None:
        self.side.synchronize()
        self._kept.clear()
        self._leaving = []
        torch.accelerator.empty_host_cache()  # gives pinned memory back, which PyTorch would keep for itself


class DiskStorage(Storage):
    """
    Keeps tensors in a temporary file. A thread writes and reads it, in parallel to the computation.

    The file has no name, so the operating system removes it when it is closed, even if the process is killed.

    Args:
        directory (`str`, *optional*): Directory of the file. `None` means the system's directory for temporary files.
        device (`torch.device`): Device of the tensors.
    """

    copies = True

    def __init__(self, directory: str | None, device: torch.device):
        self.file = tempfile.TemporaryFile(dir=directory, prefix="trl_dpg-tape-", buffering=0)
        self.device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trl_dpg-tape")
        self._writes: list[Future] = []  # writes of the last call of `put`
        self._hints: list[Future] = []
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets of dropped tensors, by size
        self._end = 0

    def put(self, tensors: list[Tensor]) -> list[Place]:
        self._end_writes()  # the writes of at most one call are under way
        keys = []
        for tensor in tensors:
            data = tensor.detach().cpu()
            free = self._free[data.nbytes]
            offset = free.pop() if free else self._end
            self._end = max(self._end, offset + data.nbytes)
            self._writes.append(self._thread.submit(self._transfer, os.pwritev, data, offset))
            keys.append((offset, data.shape, data.dtype))
        return keys

    def settle(self) -> None:
        if self.device.type == "cpu":  # from other devices, the thread writes a copy anyway
            self._end_writes()

    def _end_writes(self) -> None:
        for write in self._writes:
            write.result()  # raises the error of the write, such as a full disk
        self._writes = []

    def expect(self, keys: list[Place]) -> None:
        """Asks the operating system to read ahead into free memory, while the model is running."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        room = host_memory()[1] // 2  # reading more could evict the tensors that are needed first
        for offset, shape, dtype in keys:
            size = shape.numel() * dtype.itemsize
            room -= size
            if room < 0:
                break
            self._hints.append(self._thread.submit(self._will_need, offset, size))

    def _will_need(self, offset: int, size: int) -> None:
        # Of a large range, Linux reads only the first few MB, so the hint is given in pieces.
        for start in range(offset, offset + size, 1 << 20):
            os.posix_fadvise(self.file.fileno(), start, min(1 << 20, offset + size - start), os.POSIX_FADV_WILLNEED)

    def stream(self, keys: list[Place]) -> Iterator[Tensor]:
        for hint in self._hints:
            hint.cancel()
        self._hints = []
        for data, reading in _ahead(self._fetch, keys):
            wait([reading])
            while self._writes and self._writes[0].done():
                self._writes[0].result()  # raises the error of a failed write, whose tensor must not be used
                self._writes.pop(0)
            reading.result()
            yield data.to(self.device)

    def _fetch(self, key: Place) -> tuple[Tensor, Future]:
        offset, shape, dtype = key
        data = torch.empty(shape, dtype=dtype)  # allocated here, since the thread's heap would keep the memory
        return data, self._thread.submit(self._transfer, os.preadv, data, offset)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], data: Tensor, offset: int) -> None:
        view = memoryview(data.numpy()).cast("B")  # type: ignore[arg-type]
        while len(view) > 0:
            done = call(self.file.fileno(), [view], offset)
            if done == 0:
                raise OSError("The tape's file ends early: it was not fully written. Is the disk of `tape_dir` full?")
            view, offset = view[done:], offset + done

    def drop(self, keys: list[Place]) -> None:
        for offset, shape, dtype in keys:
            self._free[shape.numel() * dtype.itemsize].append(offset)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self.file.close()


def _ahead(fetch: Callable[[Any], Any], keys: Iterable[Any]) -> Iterator[Any]:
    """Yields `fetch(key)` for every key, and calls `fetch` for the next few keys in advance."""
    fetched: deque[Any] = deque()
    for key in keys:
        fetched.append(fetch(key))
        if len(fetched) > AHEAD:
            yield fetched.popleft()
    while fetched:
        yield fetched.popleft()
