"""Decides where the tape goes, and handles errors when memory runs out."""

import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .host import host_memory, is_in_memory, tape_directory


if TYPE_CHECKING:
    from ..method.recipe import TargetTrainingArguments


ANOTHER_FAILED = "The run ends because another process failed."


class OutOfMemory(MemoryError):
    """Memory ran out in a part of the run that takes less memory with fewer examples at a time."""


@dataclass
class MemoryPlan:
    """
    The place of a run's tape.

    Attributes:
        tape (`str`): `"device"`, `"host"` or `"disk"`.
        tape_bytes (`int`): Most bytes that gradients and states of one process take there. Cotangents of a state come on top.
    """

    tape: str
    tape_bytes: int

    def __str__(self) -> str:
        return f"tape of {_gigabytes(self.tape_bytes)} on {self.tape}"


def free_room(device: torch.device, tape_dir: str | None, num_processes: int) -> dict[str, int]:
    """Bytes that each of `num_processes` processes on this machine has for a tape, by place."""
    directory = tape_directory(tape_dir)
    host = host_memory()[1] // num_processes
    disk = 0 if directory is None else shutil.disk_usage(directory).free // num_processes
    if directory is not None and is_in_memory(directory):
        disk = min(disk, host)
    return {"device": free_memory(device) if device.type == "cuda" else host, "host": host, "disk": disk}


def place_tape(
    recipe: "TargetTrainingArguments", tape_bytes: int, state_bytes: int, free: dict[str, int]
) -> MemoryPlan:
    """
    Chooses the place of a tape of `tape_bytes`. The cotangents of a state need `state_bytes` more. `free` comes from [`free_room`].

    `tape="auto"` takes the first place with enough room. On device and host, the tape may take half of the free memory, since the rest
    of the run needs memory too. On disk, it may take all of the free room.

    Raises:
        [`MemoryError`]: If there is not enough room. The message names settings that need less.
        [`ValueError`]: If the tape should go on disk, but no directory on a disk is known.
    """
    directory = tape_directory(recipe.tape_dir)
    if recipe.tape == "disk" and directory is None:
        raise ValueError(
            '`tape="disk"` needs a directory on a disk, but the directories for temporary files are in memory (tmpfs) or cannot be '
            "written to. Set `tape_dir` (`target_tape_dir` in the trainer) to a directory on a disk."
        )
    needed, share = tape_bytes + state_bytes, 2 if recipe.tape == "auto" else 1
    places = [place for place in free if needed * (1 if place == "disk" else share) <= free[place]]
    for place in free if recipe.tape == "auto" else [recipe.tape]:
        if place in places:
            return MemoryPlan(place, tape_bytes)
    advice = [f'set `tape="{place}"`' for place in places[:1]]
    if needed > free["disk"]:
        advice.append(f"point `tape_dir` to a disk with {_gigabytes(needed)} free")
    room = ", ".join(f"{_gigabytes(free[place])} on {place}" for place in free)
    raise MemoryError(
        f"The tape of this run needs {_gigabytes(needed)} (`tape={recipe.tape!r}`), but the free room is {room} "
        f"({directory or 'none known: directories for temporary files are in memory'}). To make it fit: "
        f"{'; '.join([*advice, 'raise `batch_size` for fewer steps', 'train adapters instead of all parameters'])}."
    )


def processes_here(count: int) -> int:
    """How many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count)) if count > 1 else 1


def free_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory()[1]


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)
    return known or "bad_alloc" in str(error)  # the name of the C++ error, on the host


def clear_frames(error: BaseException | None) -> None:
    """Frees the local variables of functions that an error ended, such as graphs, while the error is still being handled."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def halved(recipe: "TargetTrainingArguments", micro_batch_size: int | None, num_examples: int, reason: str) -> int:
    """
    Half of the micro-batch size at which memory ran out. The size counts as at most `num_examples`, a process's share of the batch.

    Raises:
        [`MemoryError`]: If the size was 1. The message names other settings to change.
    """
    size = min(micro_batch_size or num_examples, num_examples)
    if size <= 1:
        advice = ["lower `max_length`"]
        if recipe.curvature == "exact":
            advice.append('set `curvature="central_difference"`')
        if not recipe.gradient_checkpointing:
            advice.append("set `gradient_checkpointing`")
        raise MemoryError(
            f"Memory ran out with one example at a time (`micro_batch_size` 1, `max_length` {recipe.max_length}). To make it "
            f"fit: {'; '.join(advice)}; train adapters instead of all parameters. {reason}"
        )
    return size // 2


@contextmanager
def explaining_memory(
    what: str = "Memory ran out for gradients, optimizer state or cotangents. A smaller `micro_batch_size` does not help. "
    'Keep the tape elsewhere (`tape="host"` or `"disk"`), or train adapters instead of all parameters.',
) -> Iterator[None]:
    """Turns an error that only says that memory ran out into one that says what to change."""
    try:
        yield
    except Exception as error:
        explained = (type(error) is MemoryError and str(error)) or str(error).startswith(ANOTHER_FAILED)
        if explained or not is_out_of_memory(error):
            raise
        raise MemoryError(f"{what} {error}") from error


def explaining_metric_memory():
    """[`explaining_memory`] for the call of a metric, where smaller micro-batches would not help."""
    return explaining_memory(
        "`metric` ran out of memory. A smaller `micro_batch_size` does not help. Let it read fewer or shorter texts, or fewer of the "
        "model's outputs."
    )
