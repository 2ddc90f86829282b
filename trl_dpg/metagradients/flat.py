"""The trained parameters as one contiguous tensor, which makes every step between two model calls elementwise."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


# Elements. Where parameters and shards start, so that kernels see aligned addresses, and whole vectors: what is left over of one
# is rounded differently, and parts would not equal the whole to the last bit.
ALIGNMENT = 64
TAIL = 64  # elements after the parameters in a gradient buffer: scalars that are summed over processes along with it


class FlatParameters:
    r"""
    Trained parameters \\( \phi \\) as views of one tensor, `values`; parameters that weight decay applies to come first.

    While the context is open, each `param.data` is a view of `values`. The caller's own tensors are never written to: on
    leaving, they are put back.

    Args:
        params (`Sequence[nn.Parameter]`):
            Distinct parameters, on one device and of one dtype.
        decayed (`Sequence[nn.Parameter]`):
            Which of them weight decay applies to.
        num_shards (`int`, *optional*, defaults to `1`):
            The flat size is padded to a multiple of this.
    """

    def __init__(self, params: Sequence[nn.Parameter], decayed: Sequence[nn.Parameter], num_shards: int = 1):
        decayed_ids = {id(p) for p in decayed}
        self.params = sorted(params, key=lambda p: id(p) not in decayed_ids)  # a stable sort
        self.offsets = []
        end = 0
        self.num_decayed = 0
        for param in self.params:
            self.offsets.append(end)
            end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
            if id(param) in decayed_ids:
                self.num_decayed = end
        self.size = -(-end // (ALIGNMENT * num_shards)) * ALIGNMENT * num_shards
        self.shard_size = self.size // num_shards
        self.device, self.dtype = self.params[0].device, self.params[0].dtype

    def __enter__(self) -> "FlatParameters":
        self._originals = [(p, p.data) for p in self.params]
        self.values = self.zeros(self.size + TAIL)[: self.size]  # the storage's size is that of gradient buffers
        for param, view in zip(self.params, self.views(self.values), strict=True):
            view.copy_(param.data)
            param.data = view
        return self

    def __exit__(self, *exception) -> None:
        self.release_gradients()
        for param, data in self._originals:
            param.data = data
        del self.values

    def zeros(self, size: int) -> Tensor:
        """Zeros on the parameters' device, of their dtype."""
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor in the parameters' shapes."""
        return [flat[o : o + p.numel()].view(p.shape) for o, p in zip(self.offsets, self.params, strict=True)]

    def accumulate_into(self, buffer: Tensor | None = None) -> Tensor:
        """
        Zeroes a buffer, or makes one, and has backward passes accumulate gradients into it. Its shape is `(size + TAIL,)`, or
        `(size,)` where nothing is summed along.

        Accumulation in place needs no second copy of all gradients.
        """
        buffer = self.zeros(self.size + TAIL) if buffer is None else buffer.zero_()
        for param, view in zip(self.params, self.views(buffer), strict=True):
            param.grad = view
        return buffer

    def release_gradients(self) -> None:
        """Has backward passes no longer write to the last buffer."""
        for param in self.params:
            param.grad = None

    def load_originals(self, start: int, shard: Tensor) -> None:
        """Writes the values that the parameters had before the context was entered, from element `start` on, into `shard`."""
        for offset, (_, data) in zip(self.offsets, self._originals, strict=True):
            first, last = max(offset, start), min(offset + data.numel(), start + len(shard))
            if first < last:
                shard[first - start : last - start] = data.reshape(-1)[first - offset : last - offset]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One flat tensor of one tensor per parameter; `None` is zeros."""
        flat = self.zeros(self.size)
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            if tensor is not None:
                view.copy_(tensor)
        return flat
