"""Seconds and memory of a function on the CPU. Standard library only: peers use it in environments of their own."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measured(function: Callable[[], Any], repeats: int = 1) -> tuple[Any, list[float], int]:
    r"""
    Calls a function a few times.

    Memory is the resident memory of this process at its highest during the calls, less what it was before the first
    one. Linux with glibc only.

    Args:
        function (`Callable`):
            What to call, without arguments.
        repeats (`int`, *optional*, defaults to `1`):
            Number of calls.

    Returns:
        `tuple[Any, list[float], int]`: What the last call returned, the seconds of each call, and the bytes.

    Example:

    ```python
    >>> from benchmarks.peers.measure import measured

    >>> result, seconds, peak_bytes = measured(lambda: len(bytearray(50_000_000)))
    >>> result, len(seconds), peak_bytes > 40_000_000
    (50000000, 1, True)

    ```
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would be used again unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present
    before = _resident_bytes("VmRSS")
    seconds = []
    for _ in range(repeats):
        result = None  # so that two results are never held at once
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, seconds, _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
