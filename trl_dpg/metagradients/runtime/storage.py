"""Where the tape lies: in the device's memory, in the host's or on disk."""

import os
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from .host import host_memory, tape_directory


AHEAD = 4  # tensors that are fetched while the caller computes
Place = tuple[int, torch.Size, torch.dtype]  # of a tensor in a file: offset, shape, type


class Storage:
    """
    Keeps flat tensors, of which most are of one size: here in the device's own memory, where nothing is copied.

    `put` takes tensors over: the caller may no longer write to them, or, if the storage `copies`, not before it calls `settle`.
    `stream` yields those of keys in order, and fetches the next ones meanwhile; the caller may write to one only if
    it drops the key. `expect` says what will be streamed next.
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
    """Pinned host memory of a CUDA device; copies run on a stream of their own, beside the computation."""

    copies = True

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device)
        self._kept: dict[int, Tensor] = {}
        self._next = 0
        self._leaving: list[Tensor] = []  # of the last call of `put`, which may still be read
        self._left = torch.cuda.Event()

    def put(self, tensors: list[Tensor]) -> list[int]:
        keys = []
        current = torch.cuda.current_stream(self.device)
        # One call's copies are under way, so that a device that lags behind the host does not fill its memory. What
        # they read is freed only for work that comes after them.
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
        finally:  # also where the caller breaks off: memory that copies still write to is not used before they end
            current.wait_stream(self.side)

    def _fetch(self, key: int) -> tuple[Tensor, torch.cuda.Event]:
        # Memory of the stream that computes, which may still be at work on what it held before; so the copy waits.
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
        torch.accelerator.empty_host_cache()  # PyTorch keeps freed pinned memory, which nothing else could use


class DiskStorage(Storage):
    """
    A temporary file, written and read by a thread beside the computation.

    The file has no name: the operating system removes it when it is closed, also when the process is killed.

    Args:
        directory (`str`, *optional*): Where the file lies. The system's directory for temporary files if `None`.
        device (`torch.device`): Where tensors come from and go to.
    """

    copies = True

    def __init__(self, directory: str | None, device: torch.device):
        self.file = tempfile.TemporaryFile(dir=directory, prefix="trl_dpg-tape-", buffering=0)
        self.device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trl_dpg-tape")
        self._writes: list[Future] = []  # of the last call of `put`
        self._hints: list[Future] = []
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets, by size
        self._end = 0

    def put(self, tensors: list[Tensor]) -> list[Place]:
        self._end_writes()  # at most one call's are under way
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
        if self.device.type == "cpu":  # otherwise what is written is a copy already
            self._end_writes()

    def _end_writes(self) -> None:
        for write in self._writes:
            write.result()  # also raises its error, such as a full disk
        self._writes = []

    def expect(self, keys: list[Place]) -> None:
        """Has the operating system read into memory that is free otherwise, while the model is called."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        room = host_memory()[1] // 2  # more would push out what is needed first
        for offset, shape, dtype in keys:
            size = shape.numel() * dtype.itemsize
            room -= size
            if room < 0:
                break
            self._hints.append(self._thread.submit(self._will_need, offset, size))

    def _will_need(self, offset: int, size: int) -> None:
        # Linux reads only the first few MB of what it is told at once
        for start in range(offset, offset + size, 1 << 20):
            os.posix_fadvise(self.file.fileno(), start, min(1 << 20, offset + size - start), os.POSIX_FADV_WILLNEED)

    def stream(self, keys: list[Place]) -> Iterator[Tensor]:
        for hint in self._hints:
            hint.cancel()
        self._hints = []
        for data, reading in _ahead(self._fetch, keys):
            wait([reading])
            while self._writes and self._writes[0].done():
                self._writes[0].result()  # raises its error: what was read was perhaps never written
                self._writes.pop(0)
            reading.result()
            yield data.to(self.device)

    def _fetch(self, key: Place) -> tuple[Tensor, Future]:
        offset, shape, dtype = key
        data = torch.empty(shape, dtype=dtype)  # not in the thread, whose heap would keep the memory
        return data, self._thread.submit(self._transfer, os.preadv, data, offset)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], data: Tensor, offset: int) -> None:
        view = memoryview(data.numpy()).cast("B")  # type: ignore[arg-type]
        while len(view) > 0:
            done = call(self.file.fileno(), [view], offset)
            if done == 0:
                raise OSError("The tape's file ends early: it was not written whole. Is the disk of `tape_dir` full?")
            view, offset = view[done:], offset + done

    def drop(self, keys: list[Place]) -> None:
        for offset, shape, dtype in keys:
            self._free[shape.numel() * dtype.itemsize].append(offset)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self.file.close()


def _ahead(fetch: Callable[[Any], Any], keys: Iterable[Any]) -> Iterator[Any]:
    """What `fetch` returns for every key, called for some of the next ones before."""
    fetched: deque[Any] = deque()
    for key in keys:
        fetched.append(fetch(key))
        if len(fetched) > AHEAD:
            yield fetched.popleft()
    while fetched:
        yield fetched.popleft()
