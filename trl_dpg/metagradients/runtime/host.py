"""Room on this machine: the memory that a container leaves to this process, and a directory for the tape."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

# For each version of control groups: files of the limit and of the use, and statistics of the page cache. Linux frees this cache when
# memory is needed, so it does not count as used.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))

IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


def host_memory(membership: Path = MEMBERSHIP, groups: Path = CGROUPS) -> tuple[int, int]:
    """
    Total and available memory in bytes, of the machine or of a container that limits it.

    `membership` is the file that names the control groups (version 1 or 2) of this process. `groups` is the folder of all groups.
    """
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in _limits(membership, groups):
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return total, available


def _limits(membership: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in: its own group, and the groups around it."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, VERSION_2
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", VERSION_1
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):  # in a container, often only the root exists
            if group.is_relative_to(root) and (limit := _read_limit(group, names)) is not None:
                yield limit


def _read_limit(group: Path, names: tuple[str, str, tuple[str, str]]) -> tuple[int, int] | None:
    limit_file, used_file, cache = names
    try:
        limit, used = int((group / limit_file).read_text()), int((group / used_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None
    return limit, used - sum(int(statistics.get(name, 0)) for name in cache)


def float64_device(device: torch.device) -> torch.device:
    """The device for float64 values: the host if the device itself has no float64, as Apple's has not."""
    return torch.device("cpu") if device.type == "mps" else device


def double(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on its [`float64_device`]."""
    return tensor.to(float64_device(tensor.device)).double()


def is_in_memory(directory: str) -> bool:
    """Whether files in a directory take memory instead of disk space."""
    path, best, kind = Path(os.path.realpath(directory)), -1, ""
    for mount in psutil.disk_partitions(all=True):
        if path.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= best:  # of two in one place, the last
            best, kind = len(mount.mountpoint), mount.fstype
    return kind in IN_MEMORY


def tape_directory(asked_for: str | None) -> str | None:
    """
    Directory of a tape on disk: the one asked for by `tape_dir`, or else the system's directory for temporary files or `/var/tmp`.
    The last two are skipped if they are in memory or cannot be written to. `None` if none is left.
    """
    if asked_for is not None:
        return asked_for
    for directory in (tempfile.gettempdir(), "/var/tmp"):
        if os.access(directory, os.W_OK) and not is_in_memory(directory):
            return directory
    return None
