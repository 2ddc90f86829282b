"""Models in shards: every process holds a part of each parameter, and gathers the whole parameter only while it is read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

from .processes import Processes
from .workspace import Group


# Getters that read a tensor's values, and methods that only describe the tensor. All other getters describe it, too.
VALUES = {"T", "mT", "H", "mH", "data", "real", "imag"}
DESCRIPTIONS = set("size stride dim numel element_size is_floating_point is_complex __len__ __hash__".split())


class Layout:
    """
    The split of a parameter by rows. Every process has the same number of rows; the last processes may have fewer or none.

    Args:
        index (`int`): Index of the parameter among those of the model.
        original (`DTensor`): The parameter as the model had it.
        shards ([`Shards`]): All parameters in shards of the model.
    """

    def __init__(self, index: int, original: DTensor, shards: "Shards"):
        self.index, self.original, self.shards = index, original, shards
        self.places: list[tuple[nn.Module, str]] = []
        self.group = original.device_mesh.get_group()
        self.rows = -(-len(original) // original.device_mesh.size())
        self.first = original.device_mesh.get_local_rank() * self.rows
        self.local = nn.Parameter(original.to_local().detach(), original.requires_grad)

    def whole(self, values: Tensor) -> Tensor:
        """Gathers the whole tensor from the parts of all processes. It can be differentiated any number of times."""
        return _Gather.apply(values, self, self.shards.is_replicated)

    def gather(self, part: Tensor) -> Tensor:
        """The same without a derivative. `Shards` remembers that its memory is a copy of this parameter."""
        part, count = self._padded(part.detach(), self.rows), self.shards.processes.count
        whole = part.new_empty(count * self.rows, *part.shape[1:])
        self.shards.processes.agree(place=self.index)
        dist.all_gather_single(whole, part, group=self.group)
        self.shards.note(whole, self)
        return whole[: len(self.original)]

    def scatter(self, whole: Tensor) -> Tensor:
        """Sums a whole tensor over all processes, and returns this process's part of the sum."""
        whole = self._padded(whole.detach(), self.shards.processes.count * self.rows)
        part = whole.new_empty(self.rows, *whole.shape[1:])
        self.shards.processes.agree(place=self.index)
        dist.reduce_scatter_single(part, whole, group=self.group)
        return part[: len(self.local)]

    @staticmethod
    def _padded(tensor: Tensor, rows: int) -> Tensor:
        padding = [0, 0] * (tensor.ndim - 1) + [0, rows - len(tensor)]
        return (F.pad(tensor, padding) if rows > len(tensor) else tensor).contiguous()


class _Gather(torch.autograd.Function):
    """Maps a process's part to the whole tensor. Its adjoint is [`_Scatter`], whose adjoint is `_Gather` again."""

    @staticmethod
    def forward(ctx, part: Tensor, layout: Layout, replicated: bool) -> Tensor:
        ctx.layout, ctx.replicated = layout, replicated
        return layout.gather(part)

    @staticmethod
    def backward(ctx, cotangent):
        return _Scatter.apply(cotangent, ctx.layout, ctx.replicated, torch.is_grad_enabled()), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return ctx.layout.gather(tangent)


class _Scatter(torch.autograd.Function):
    """
    Maps the cotangents of a whole tensor on all processes to this process's part of their sum. If `replicated`, all cotangents are
    equal, and the result is a part of this one.

    A second-order graph differentiates the sum but does not read its value, so the sum is not computed there.
    """

    @staticmethod
    def forward(ctx, whole: Tensor, layout: Layout, replicated: bool, second_order: bool) -> Tensor:
        ctx.layout = layout
        if replicated:
            return whole[layout.first : layout.first + len(layout.local)].contiguous()
        return whole.new_zeros(()).expand_as(layout.local) if second_order else layout.scatter(whole)

    @staticmethod
    def backward(ctx, direction):
        return _Gather.apply(direction, ctx.layout, False), None, None, None


class ShardedParameter(Tensor):
    """
    Takes the place of a parameter in a model, with the same shape. A function that it is passed to gets the newly gathered
    parameter.

    Args:
        part (`Tensor`): This process's part of the parameter.
        home ([`Layout`]): The split of the parameter.
    """

    part: Tensor
    home: Layout

    @staticmethod
    def __new__(cls, part: Tensor, home: Layout):
        shape, like = home.original.shape, home.local
        self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        self.part, self.home, self._is_param = part, home, True
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        is_getter = func.__name__ in ("__get__", "__set__")
        if is_getter and func.__self__.__name__ not in VALUES or func.__name__ in DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, lambda p: p.home.whole(p.part), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise ValueError(
            f"{func} of the target model reads the memory of a parameter directly, as compiled and fused layers do. A parameter in "
            "shards has no such memory. Turn such layers off (`use_liger_kernel`, `use_kernels`), or do not shard the target "
            "(`target_fsdp=False` in the trainer)."
        )


def split(param: Tensor) -> tuple[Tensor, Layout | None]:
    """This process's part of a parameter and its layout. A whole parameter has no layout (`None`)."""
    return (param.part, param.home) if isinstance(param, ShardedParameter) else (param, None)


def standing_in(param: Tensor, part: Tensor) -> Tensor:
    """Makes of `part` a tensor that can take the place of `param` in the model."""
    return ShardedParameter(part, param.home) if isinstance(param, ShardedParameter) else part


def is_gathered(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that was gathered from its shards."""
    return isinstance(tensor.grad_fn, _Gather._backward_cls)  # type: ignore[attr-defined]


class Shards:
    """
    The parameters of a model that `fully_shard` or [`~torch.distributed.tensor.distribute_tensor`] split into shards. A whole model has
    none.

    Inside the context, a [`ShardedParameter`] takes the place of each such parameter, and FSDP's own hooks are off. A parameter is
    gathered when it is read, and again when its gradient is computed. So the model can be differentiated twice, and memory holds one
    whole layer at a time. All processes must make the same calls of the model, on the same number of examples.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        processes ([`Processes`]): The processes that hold the model.

    Raises:
        [`ValueError`]: If some trained parameter is not split by its first dimension, over all of `processes`.
    """

    def __init__(self, model: nn.Module, processes: Processes):
        self.model, self.processes = model, processes
        self.is_replicated = False
        self._live: dict[int, tuple[StorageWeakRef, Layout]] = {}
        self._layouts: dict[int, Layout] = {}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for path, module in model.named_modules():
            for name, param in module._parameters.items():
                if isinstance(param, DTensor):
                    if id(param) not in self._layouts:
                        _check_split(f"{path}.{name}".lstrip("."), param, processes)
                        self._layouts[id(param)] = Layout(len(self._layouts), param, self)
                    self._layouts[id(param)].places.append((module, name))
        for name, param in model.named_parameters() if self._layouts else ():
            if param.requires_grad and id(param) not in self._layouts:
                raise ValueError(
                    f"The target model is in shards, but its trained parameter {name!r} is whole. Shard the model with all of its "
                    "parameters, adapters among them (`fully_shard` after `get_peft_model`)."
                )
        processes.in_step = bool(self._layouts)

    def __enter__(self) -> "Shards":
        with ExitStack() as stack:
            if self._layouts:
                stack.enter_context(_resting_hooks(self.model))
                stack.callback(self._place, lambda layout: layout.original)
                self._place(lambda layout: ShardedParameter(layout.local, layout))
                stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def of_groups(self, groups: list[Group]) -> list[Group]:
        """
        Replaces parameters in groups by this process's parts. Whole parameters stay as they are.

        Raises a [`ValueError`] if a rule needs whole parameters, but they are in shards.
        """
        if not self._layouts:
            return groups
        for rule_class, *_ in groups:
            if not rule_class.elementwise:
                raise ValueError(
                    f'`optim` needs whole matrices ({rule_class.__name__}), but the target is in shards. Set `optim="adamw"` or "sgd", '
                    "or do not shard the target (`target_fsdp=False` in the trainer)."
                )
        return [group._replace(params=[self._layouts[id(p)].local for p in group.params]) for group in groups]

    @contextmanager
    def replicated(self) -> Iterator[None]:
        """Inside, all processes compute the same value from the parameters, such as a metric. Gradients are then not summed."""
        self.is_replicated = True
        try:
            yield
        finally:
            self.is_replicated = False

    def note(self, whole: Tensor, layout: Layout) -> None:
        """Remembers which parameter a gathered tensor is a copy of, as long as the tensor is in use."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        storage = whole.untyped_storage()
        self._live[storage._cdata] = StorageWeakRef(storage), layout

    def _place(self, make) -> None:
        for layout in self._layouts.values():
            tensor = make(layout)
            for module, name in layout.places:
                module._parameters[name] = tensor

    # Instead of a gathered parameter, a graph saves where to gather it from

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided:
            return tensor
        ref, layout = self._live.get(tensor.untyped_storage()._cdata, (None, None))
        if ref is None or ref.expired():
            return tensor
        return layout, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        layout, *geometry = kept
        return layout.gather(layout.local).as_strided(*geometry)


def is_in_shards(model: nn.Module) -> bool:
    """Whether a model was split into shards, by FSDP or by hand."""
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def processes_of(model: nn.Module) -> Processes:
    """The processes that hold a model: all if it is in shards, this process alone if the model is whole."""
    return Processes(PartialState() if is_in_shards(model) else None)


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Makes it possible to call a model outside of a run, even if it is in shards. All processes that hold it must call it."""
    with Shards(model, processes_of(model)) as shards, shards.replicated():
        yield


def _check_split(name: str, param: DTensor, processes: Processes) -> None:
    mesh = param.device_mesh
    if mesh.ndim != 1 or param.placements != (Shard(0),):
        raise ValueError(
            f"{name!r} of the target model has the placements {param.placements} on a mesh of {mesh.ndim} dimensions. Shard the target by "
            "`fully_shard` over a mesh of one dimension, without tensor parallelism and replication."
        )
    if mesh.size() != processes.count:
        raise ValueError(
            f"The target model is in shards over {mesh.size()} processes, but {processes.count} share the run. Pass an `accelerator` of "
            "all processes that hold the model."
        )
    if param.to_local().device.type != mesh.device_type:
        raise ValueError(
            f"{name!r} of the target model has its shards on {param.to_local().device.type}, but exchanges them on {mesh.device_type}. "
            'Shard the target without `CPUOffloadPolicy`. To save memory, keep the tape on the host (`tape="host"`).'
        )


@contextmanager
def _resting_hooks(model: nn.Module) -> Iterator[None]:
    """Removes FSDP's hooks from a model inside a `with` block."""
    registers = [hooks for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    originals = [dict(hooks) for hooks in registers]
    for hooks in registers:
        for key in [
            key for key, hook in hooks.items() if (hook.__module__ or "").startswith("torch.distributed.fsdp")
        ]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, original in zip(registers, originals, strict=True):
            hooks.clear()
            hooks.update(original)
