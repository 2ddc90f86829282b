"""Where the tape lies: in the device's memory, in the host's or on disk."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from torch import Tensor


class Storage(Protocol):
    """
    Keeps flat tensors of one size.

    `put` takes a tensor over: the caller may no longer write to it. `get` returns a tensor that the caller may write to only
    after `drop`; with `ahead`, what will be asked for next is fetched while the caller computes.
    """

    def put(self, tensor: Tensor) -> Any: ...

    def get(self, key: Any, ahead: Any = None) -> Tensor: ...

    def drop(self, key: Any) -> None: ...

    def close(self) -> None: ...


def open_storage(location: str, directory: str | None, device: torch.device) -> Storage:
    """Storage at `"device"`, `"host"` or `"disk"`. For a model on the CPU, host and device are the same."""
    if location == "disk":
        return DiskStorage(directory, device)
    if location == "host" and device.type == "cuda":
        return HostStorage(device)
    return DeviceStorage()


class DeviceStorage:
    """The device's own memory. Nothing is copied."""

    def put(self, tensor: Tensor) -> Tensor:
        return tensor

    def get(self, key: Tensor, ahead: Tensor | None = None) -> Tensor:
        return key

    def drop(self, key: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


class HostStorage:
    """
    Pinned host memory of a CUDA device; copies run on a stream of their own, beside the computation.

    Tensors are cut into blocks of a power of two, as PyTorch rounds pinned allocations up to one.
    """

    BLOCK = 1 << 24  # elements

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._blocks: dict[int, list[Tensor]] = {}
        self._next = 0
        self._ahead: tuple[int, Tensor] | None = None

    def put(self, tensor: Tensor) -> int:
        blocks = []
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for part in tensor.split(self.BLOCK):
                blocks.append(torch.empty(part.shape, dtype=part.dtype, pin_memory=True))
                blocks[-1].copy_(part, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not reused before it is copied
        self._blocks[self._next] = blocks
        self._next += 1
        return self._next - 1

    def get(self, key: int, ahead: int | None = None) -> Tensor:
        tensor = self._ahead[1] if self._ahead is not None and self._ahead[0] == key else self._fetch(key)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self._ahead = None if ahead is None else (ahead, self._fetch(ahead))
        return tensor

    def _fetch(self, key: int) -> Tensor:
        # Memory of the stream that computes, which has it again when the tensor is freed; it may still be at work on it.
        tensor = torch.empty(sum(map(len, self._blocks[key])), dtype=self._blocks[key][0].dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for part, block in zip(tensor.split(self.BLOCK), self._blocks[key], strict=True):
                part.copy_(block, non_blocking=True)
        tensor.record_stream(self.stream)
        return tensor

    def drop(self, key: int) -> None:
        del self._blocks[key]

    def close(self) -> None:
        self.stream.synchronize()
        self._blocks.clear()
        self._ahead = None
        torch.accelerator.empty_host_cache()  # PyTorch keeps freed pinned memory, which nothing else could use


class DiskStorage:
    """
    A temporary file, written and read by a thread beside the computation.

    The file has no name: the operating system removes it when it is closed, also when the process is killed.

    Args:
        directory (`str`, *optional*): Where the file lies. The system's directory for temporary files if `None`.
        device (`torch.device`): Where tensors come from and go to.
    """

    def __init__(self, directory: str | None, device: torch.device):
        self.file = tempfile.TemporaryFile(dir=directory, prefix="trl_dpg-tape-", buffering=0)
        self.device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trl_dpg-tape")
        self._writing: Future | None = None
        self._ahead: tuple[int, Tensor, Future] | None = None
        self._free: list[int] = []
        self._end = 0

    def put(self, tensor: Tensor) -> int:
        if self._writing is not None:
            self._writing.result()  # at most one write is under way; also raises its error, such as a full disk
        self._shape, self._dtype = tensor.shape, tensor.dtype
        key = self._free.pop() if self._free else self._end
        self._end = max(self._end, key + tensor.nbytes)
        data = tensor.detach().cpu()
        self._writing = self._thread.submit(self._transfer, os.pwritev, data, key)
        return key

    def get(self, key: int, ahead: int | None = None) -> Tensor:
        if self._ahead is None or self._ahead[0] != key:
            self._ahead = self._read(key)
        _, tensor, reading = self._ahead
        wait([reading])
        if self._writing is not None and self._writing.done():
            self._writing.result()  # raises its error, such as a full disk: what was read was perhaps never written
        reading.result()
        self._ahead = None if ahead is None else self._read(ahead)
        return tensor.to(self.device)

    def _read(self, key: int) -> tuple[int, Tensor, Future]:
        data = torch.empty(self._shape, dtype=self._dtype)  # not in the thread, whose heap would keep the memory
        return key, data, self._thread.submit(self._transfer, os.preadv, data, key)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], data: Tensor, offset: int) -> None:
        view = memoryview(data.numpy()).cast("B")  # type: ignore[arg-type]
        while len(view) > 0:
            done = call(self.file.fileno(), [view], offset)
            if done == 0:
                raise OSError("The tape's file ends early: it was not written whole. Is the disk of `tape_dir` full?")
            view, offset = view[done:], offset + done

    def drop(self, key: int) -> None:
        self._free.append(key)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self.file.close()
