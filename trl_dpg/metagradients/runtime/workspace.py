r"""The trained parameters as one contiguous tensor, and all other tensors of that size."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .host import double
from .processes import Processes


if TYPE_CHECKING:
    from ..method.updates import Update


# Parameters and shards start at multiples of this many elements. So kernels see aligned addresses and whole vectors. Kernels round
# the rest of a vector differently, so parts would otherwise not equal the whole to the last bit.
ALIGNMENT = 64


class Group(NamedTuple):
    """Parameters with the same update rule and weight decay. A rule that is not elementwise has a group for each parameter."""

    rule_class: "type[Update]"
    decayed: bool
    params: list[nn.Parameter]


def parameter_groups(
    rule_class: "type[Update]",
    model: nn.Module,
    params: list[nn.Parameter],
    decayed: list[nn.Parameter],
    rest: "type[Update]",
) -> list[Group]:
    """Groups parameters by update rule and weight decay: `rule_class` where it suits a parameter, else the elementwise `rest`."""
    ids = {id(param) for param in decayed}
    suited = [param for param in params if rule_class.suits(param, model)]
    groups = [] if rule_class.elementwise else [Group(rule_class, id(param) in ids, [param]) for param in suited]
    taken = {id(param) for group in groups for param in group.params}
    for is_decayed in (True, False):
        others = [p for p in params if id(p) not in taken and (id(p) in ids) == is_decayed]
        if others:
            groups.append(Group(rule_class if rule_class.elementwise else rest, is_decayed, others))
    return groups


class Workspace:
    r"""
    Trained parameters \\( \phi \\) as views of one tensor, `phi`. Gradients and Hessian-vector products have tensors of the same layout.

    Inside the context, each `param.data` is a view of `phi`. The caller's own tensors are never written to, and are put back on
    leaving.

    With several processes, each keeps only its *shard*, an equal part, of the tape and of cotangents. On every process, `phi`,
    gradients and products are whole. If the model itself is in shards, each process has only its part of all these tensors.

    Args:
        groups (`Sequence[Group]`): Distinct parameters, on one device and of one dtype. Groups stay together, in order.
        processes ([`Processes`]): The processes that share the run.
        may_split_tape (`bool`): Whether the tape and cotangents may be split, since all update rules are elementwise.
    """

    def __init__(self, groups: Sequence[Group], processes: Processes, may_split_tape: bool):
        self.processes = processes
        self.params = [param for group in groups for param in group.params]
        self.offsets: list[int] = []
        self.parts: list[slice] = []  # part of each group in `phi`
        end = 0
        for rule_class, _, params in groups:
            start = end
            for param in params:
                self.offsets.append(end)
                end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
            self.parts.append(slice(start, end if rule_class.elementwise else start + params[0].numel()))
        num_shards = processes.count if may_split_tape and not processes.in_step else 1
        self.size = -(-end // (ALIGNMENT * num_shards)) * ALIGNMENT * num_shards
        if groups[-1].rule_class.elementwise:  # the padding of the shards is updated too, from zero to zero
            self.parts[-1] = slice(self.parts[-1].start, self.size)
        self.tape_is_split = num_shards > 1
        self.shard_size = self.size // num_shards
        first = processes.index * self.shard_size if self.tape_is_split else 0
        self.shard = slice(first, first + self.shard_size)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self.phi = self.buffer()
        for param, view in zip(self.params, self.views(self.phi), strict=True):
            view.copy_(param.data)

    def __enter__(self) -> "Workspace":
        self._originals = [(p, p.data) for p in self.params]
        for param, view in zip(self.params, self.views(self.phi), strict=True):
            param.data = view
        return self

    def __exit__(self, *exception) -> None:
        self.release_gradients()
        for param, data in self._originals:
            param.data = data
        del self.phi

    @contextmanager
    def undoing_writes(self) -> Iterator[None]:
        """Undoes what a block writes to the caller's own tensors. It is used before the workspace's context is entered."""
        try:
            yield
        finally:
            for param, view in zip(self.params, self.views(self.phi), strict=True):
                if not torch.equal(param.data, view):
                    param.data.copy_(view)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the parameters' device, of their dtype."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def buffer(self) -> Tensor:
        """Zeros in the layout of `phi`, shape `(size,)`."""
        return self.zeros(self.size)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor in the parameters' shapes."""
        return [flat[o : o + p.numel()].view(p.shape) for o, p in zip(self.offsets, self.params, strict=True)]

    def accumulate_into(self, buffer: Tensor) -> None:
        """Zeroes a buffer, and makes backward passes accumulate gradients into it, without a second copy of all gradients."""
        buffer.zero_()
        for param, view in zip(self.params, self.views(buffer), strict=True):
            param.grad = view

    def release_gradients(self) -> None:
        """Stops backward passes from writing to the buffer of `accumulate_into`."""
        for param in self.params:
            param.grad = None

    @contextmanager
    def summing_over_processes(self, buffer: Tensor | None, sums: list[float]) -> Iterator[None]:
        """[`Processes.summing_over_processes`] of a block whose backward passes accumulate into `buffer`, if there is one."""
        if buffer is not None:
            self.accumulate_into(buffer)
        with self.processes.summing_over_processes(buffer, sums):
            yield

    def start_adjoint(self, num_steps: int) -> None:
        """Allocates the memory of the adjoint sweep. A run of one step needs hardly any."""
        if num_steps > 1:
            self.hessian_product = self.buffer()
            self.grad_cotangent = self.zeros(self.shard_size)
        self.own_phi = self.zeros(self.shard_size) if self.tape_is_split else self.phi

    def load_originals(self, out: Tensor) -> None:
        """Writes the parameters from before the context was entered to `out`: all of them, or this process's shard."""
        first = 0 if len(out) == self.size else self.shard.start
        last = first + len(out)
        for offset, (_, data) in zip(self.offsets, self._originals, strict=True):
            start, stop = max(offset, first), min(offset + data.numel(), last)
            if start < stop:
                out[start - first : stop - first] = data.reshape(-1)[start - offset : stop - offset]

    def sum_if_split(self, number: float) -> float:
        """Sums a number over the processes, if each of them holds only a part of the parameters."""
        return self.processes.sum_float(number) if self.tape_is_split or self.processes.in_step else number

    def norm(self, flat: Tensor) -> float:
        """Norm of a tensor in the layout of `phi`, over all processes."""
        # The norm in float64 is slow and takes a copy, but it cannot underflow to zero.
        if not self.processes.in_step:
            return flat.norm().item() or double(flat).norm().item()
        squares = lambda part: self.processes.sum_float(part.norm().item() ** 2)  # noqa: E731
        return math.sqrt(squares(flat) or squares(double(flat)))

    def gather_and_load_phi(self, shard: Tensor) -> Tensor:
        r"""Gathers a tensor from its shards. Also gathers \\( \phi_t \\), and loads it into the model."""
        if not self.tape_is_split:
            return shard
        self.phi.copy_(self.processes.gather(self.own_phi))
        return self.processes.gather(shard)
