"""What a run will need, before it starts: memory of the device and of the host, room on disk. And where it runs out."""

import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.modeling_layers import GradientCheckpointingLayer

from .arguments import TargetTrainingArguments
from .flat import FlatParameters
from .host import host_memory, is_in_memory, tape_directory
from .losses import MicroBatch, TokenLosses
from .model import vocab_size, without_checkpoints
from .optimizers import Optimizer
from .second_order import cheaper_second_order, num_in_graph, twice_differentiable
from .tape import tape_tensors
from .vocabulary import chunk_size


# Activations of a pass over those of a forward pass, by the same kernels: measured
ACTIVATIONS = {"gradient": 1.7, "exact": 4.0, "central_difference": 1.8}

# What several uses of a parameter contribute to a Hessian-vector product is held until all of it is there: in tensors of the size of
# the trained parameters, measured 2.2
CONTRIBUTIONS = 2.5

# Chunks of logits at once, in a gradient and in a second derivative
CHUNKS = {"gradient": 2, "exact": 4, "central_difference": 2}

# The most blocks that a step taken off the tape has in hand: intermediate results; elsewhere also what is read and written
BLOCKS = {"device": 3, "host": 14, "disk": 14}


class OutOfMemory(MemoryError):
    """Memory ran out where fewer examples at a time need less of it."""


@dataclass
class MemoryPlan:
    """
    Predicted needs of one process, in bytes, beyond the model's own weights. What the metric itself needs is not known.

    Attributes:
        tape (`str`):
            Where the tape lies: `"device"`, `"host"` or `"disk"`.
        tape_bytes (`int`):
            The most that gradients and states take up there.
        peak_bytes (`int`):
            Peak of the device's memory; with the tape, if it lies there.
        activation_bytes (`int`):
            What one forward pass over a micro-batch keeps for its backward pass.
    """

    tape: str
    tape_bytes: int
    peak_bytes: int
    activation_bytes: int

    def __str__(self) -> str:
        return f"tape of {_gigabytes(self.tape_bytes)} on {self.tape}, peak of {_gigabytes(self.peak_bytes)} beyond the model"


def plan_memory(
    losses: TokenLosses,
    flat: FlatParameters,
    args: TargetTrainingArguments,
    num_steps: int,
    batches: list[MicroBatch],
    num_processes: int = 1,
) -> MemoryPlan:
    """
    Predicts what a run needs and decides where its tape goes.

    Args:
        losses ([`TokenLosses`]): Losses of the model; run forwards on one example, and on two.
        flat ([`FlatParameters`]): Its trained parameters.
        args ([`TargetTrainingArguments`]): `tape="auto"` takes the first of device, host and disk that has room.
        num_steps (`int`): Steps K.
        batches (`list[MicroBatch]`): This process's part of the largest batch.
        num_processes (`int`, *optional*, defaults to `1`): How many share the run.

    Raises:
        [`OutOfMemory`]: If there is not enough room, but smaller micro-batches would do.
        [`MemoryError`]: If there is not enough room; the message names settings that need less.
        [`ValueError`]: If the tape is to be on disk, but no directory on a disk is known.
    """
    directory = tape_directory(args.tape_dir)
    if args.tape == "disk" and directory is None:
        raise ValueError(
            '`tape="disk"` needs a directory on a disk, but those for temporary files are in memory (tmpfs) or cannot be written '
            "to. Set `tape_dir` (`target_tape_dir` in the trainer) to one on a disk."
        )
    in_memory = directory is not None and is_in_memory(directory)
    of_parameters = flat.size * flat.values.element_size()
    of_shard = flat.shard_size * flat.values.element_size()
    tape = tape_tensors(num_steps, args.optim) * of_shard
    rows = len(batches[0].indices) if batches else 0
    activations = whole = chunk = 0
    try:
        if batches:
            logits = min(batches[0].input_ids.numel() * vocab_size(losses.model), chunk_size(flat.device))
            chunk = logits * flat.values.element_size()
            activations = whole = _activation_bytes(losses, batches[0], args.gradient_checkpointing)
            if args.curvature == "exact":  # a second derivative keeps what was recomputed, but less of some layers
                with twice_differentiable(losses.model), cheaper_second_order(losses.model, args.bf16):
                    whole = _activation_bytes(losses, batches[0], False)
    except Exception as error:  # of two examples at a time
        if not is_out_of_memory(error):
            raise
        clear_frames(error)
        raise OutOfMemory(str(error)) from None
    moments = 2 if args.optim == "adamw" else 0
    on_cpu, several = flat.device.type == "cpu", num_processes > 1
    on_device = {"device": True, "host": on_cpu, "disk": on_cpu and in_memory}
    # The cotangents of the moments lie where the tape does, but are not counted in its size.
    aside = moments * of_shard if num_steps > 1 else 0
    block = min(Optimizer.BLOCK.get(flat.device.type, flat.size) * flat.values.element_size(), of_shard)

    def working(place: str, share: float = 1.0) -> int:
        """Peak of the device's memory without the tape, with this share of the micro-batch's examples."""
        # parameters, gradient and moments; one more: with several processes the part on its way to the tape, with one slack for what
        # the allocator keeps
        training = (3 + moments) * of_parameters + int(share * ACTIVATIONS["gradient"] * activations)
        training += CHUNKS["gradient"] * chunk
        # Between model calls, parameters, moments and the cotangent of the parameters. With AdamW, lambda_g is where the second
        # moment was, and with one process the product where the first was; otherwise there is memory for them.
        replay = of_parameters + (1 + (moments or 1)) * of_shard + on_device[place] * aside
        if several or not moments:
            replay += of_parameters
        adjoint = replay + int(share * ACTIVATIONS[args.curvature] * whole) + CHUNKS[args.curvature] * chunk
        if several:
            adjoint += of_parameters + of_shard  # all of lambda_g, and this process's part of the parameters
            replay += 3 * of_shard + 4 * of_parameters  # a shard of the parameters; two tensors are put together
        if args.curvature == "exact":
            in_graph = num_in_graph(losses.model, flat.params, args.bf16) * flat.values.element_size()
            adjoint += int(CONTRIBUTIONS * of_parameters) + in_graph
        return max(training, adjoint, replay + BLOCKS[place] * block)

    neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)) if several else 1
    device, host = _free_memory(flat.device), host_memory()[1] // neighbors
    if on_cpu:
        device //= neighbors
    disk = 0 if directory is None else shutil.disk_usage(directory).free // neighbors
    free = {"device": device, "host": host, "disk": min(disk, host) if in_memory else disk}
    kept = {"host": tape + aside, "disk": tape + aside}
    if flat.device.type == "cuda":
        size = Optimizer.BLOCK["cuda"] * flat.values.element_size()
        kept["host"] = (tape + aside) // of_shard * _pinned_bytes(of_shard, size)

    def fits(place: str, share: float = 1.0) -> bool:
        if on_device[place] and place != "disk":
            return working(place, share) + tape <= device
        return working(place, share) + tape * on_device[place] <= device and kept[place] <= free[place]

    considered = list(on_device) if args.tape == "auto" else [args.tape]
    for place in considered:
        if fits(place):
            return MemoryPlan(place, tape, working(place) + tape * on_device[place], activations)

    advice: list[str] = []
    refusal: type[MemoryError] = MemoryError
    least = min(working(place) for place in considered)
    advice += [f'set `tape="{place}"`' for place in on_device if fits(place)][:1]
    if least > device:
        smaller = [n for n in range(1, rows) if any(fits(place, n / rows) for place in considered)]
        if smaller:
            advice.append(f"set `micro_batch_size` to {smaller[-1]} or less")
            refusal = OutOfMemory
        if not args.gradient_checkpointing:
            advice.append("set `gradient_checkpointing`")
        if args.curvature == "exact":
            advice.append('set `curvature="central_difference"`')
    if tape + aside > free["disk"]:
        advice.append(
            f"point `tape_dir` to a disk with {_gigabytes(tape + aside)} free, or raise `batch_size` for fewer steps"
        )
    advice.append("train adapters instead of all parameters")
    raise refusal(
        f"This run of {num_steps} steps needs {_gigabytes(least)} of the device's memory beyond the model and "
        f"{_gigabytes(tape + aside)} for the tape (`tape={args.tape!r}`), but free are {_gigabytes(device)} on the device, "
        f"{_gigabytes(host)} on the host and {_gigabytes(free['disk'])} on disk ({directory or 'none known: directories for temporary files are in memory'}). To make it fit: "
        f"{'; '.join(advice)}."
    )


def _activation_bytes(losses: TokenLosses, batch: MicroBatch, checkpointing: bool) -> int:
    """
    Bytes that a forward pass keeps, other than parameters. What two examples keep more than one, all others do, too; the rest,
    such as weights cast to bfloat16, is kept once.

    With checkpointing, these are the inputs of layers, and what one of them keeps while it is recomputed.
    """
    if checkpointing:
        layers = sum(isinstance(m, GradientCheckpointingLayer) for m in losses.model.modules())
        return _kept_bytes(losses, batch) + _activation_bytes(losses, batch, False) // layers
    with without_checkpoints(losses.model):
        return _kept_bytes(losses, batch)


def _kept_bytes(losses: TokenLosses, batch: MicroBatch) -> int:
    kept = [_bytes_of(losses, batch.first(n), batch.labels[:, 1:].numel()) for n in (1, 2)]
    return kept[0] + (len(batch.indices) - 1) * (kept[1] - kept[0])


def _bytes_of(losses: TokenLosses, batch: MicroBatch, num_tokens: int) -> int:
    own = {p.untyped_storage().data_ptr() for p in losses.parameters()}
    kept = {}  # storages, not tensors: these would tie a knot with their graph that nothing ever frees

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):  # there is no backward pass
        values = losses(batch, num_tokens=num_tokens)
    del values
    return sum(storage.nbytes() for storage in kept.values())


def _pinned_bytes(size: int, block: int) -> int:
    """Of a tensor that is pinned block by block: PyTorch rounds each up to a power of two, which whole blocks are."""
    rest = size % block
    return size - rest + (1 << (rest - 1).bit_length() if rest > 0 else 0)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory()[1]


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of the device or of the host."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)
    return known or "bad_alloc" in str(error)  # what C++ calls it, on the host


def clear_frames(error: BaseException | None) -> None:
    """Frees what the functions that an error ended still hold, such as a graph, while the error itself is being handled."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def halved(args: TargetTrainingArguments, num_examples: int, reason: str) -> int:
    """
    Half of the micro-batch size.

    Args:
        args ([`TargetTrainingArguments`]): What ran out of memory.
        num_examples (`int`): The most that one process had of the batch.
        reason (`str`): The error.

    Raises:
        [`MemoryError`]: If it was 1; the message names what else to lower.
    """
    size = min(args.micro_batch_size or num_examples, num_examples)
    if size <= 1:
        advice = ["lower `max_length`"]
        if args.curvature == "exact":
            advice.append('set `curvature="central_difference"`')
        if not args.gradient_checkpointing:
            advice.append("set `gradient_checkpointing`")
        raise MemoryError(
            f"Memory ran out with one example at a time (`micro_batch_size` 1, `max_length` {args.max_length}). To make it "
            f"fit: {'; '.join(advice)}; train adapters instead of all parameters. {reason}"
        )
    return size // 2


@contextmanager
def metric_memory() -> Iterator[None]:
    """Has a metric that runs out of memory say that it did: smaller micro-batches would not help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            "`metric` ran out of memory, in which `micro_batch_size` has no part. Have it read fewer or shorter texts, or "
            f"fewer of the model's outputs. {error}"
        ) from error
