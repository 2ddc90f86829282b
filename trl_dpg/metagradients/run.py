"""A fine-tuning run of the target, forwards and backwards, with what the paper does not speak of: processes, memory, progress."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import release_memory
from torch import Tensor
from tqdm.auto import tqdm

from .arguments import TargetTrainingArguments
from .derivatives import CentralDifference, Derivatives, Exact, gradient
from .dora import ThroughDetached, dora_under, has_dora
from .flat import TAIL, FlatParameters
from .losses import MicroBatch, TokenLosses, micro_batches, prepare_examples
from .memory import MemoryPlan, OutOfMemory, halved, metric_memory, plan_memory
from .metric import Metric, as_metric, evaluate, read_out
from .model import (
    TargetModel,
    check_full_precision,
    check_model,
    check_positions,
    checkpointed,
    decayed_parameters,
    make_deterministic,
    restored,
    trainable_parameters,
    vocab_size,
)
from .optimizers import Hyperparameters, Optimizer
from .processes import Processes
from .storage import DeviceStorage, Storage, open_storage
from .tape import Tape


logger = logging.getLogger(__name__)

# `adam_epsilon_root="auto"`, in mean squares of the first gradient. With 1 generators learn more slowly (examples/results).
AUTO_EPSILON_ROOT = 4.0

Result = TypeVar("Result")


class TargetRun:
    """
    One fine-tuning run while it is open: its forward sweep, and the steps that walk it back.

    Takes what [`~trl_dpg.metagradients.compute_metagradients`] takes.
    """

    def __init__(
        self,
        model: TargetModel,
        examples: Sequence[Mapping[str, Any]],
        metric: Callable[[Any], Tensor],
        args: TargetTrainingArguments,
        accelerator: Accelerator | PartialState | None,
    ):
        self.model, self.metric, self.args = model, as_metric(metric), args
        self.processes = Processes(accelerator)
        with self.processes.failing_together():
            self.params = trainable_parameters(model)
            check_model(model)
            if args.curvature == "central_difference" and has_dora(model):
                raise ValueError(
                    "`curvature='central_difference'` does not go with DoRA, whose gradient is not the derivative of its loss: "
                    'differences of losses are not its metagradients. Set `curvature="exact"`.'
                )
            if args.gradient_checkpointing and has_dora(model):
                raise ValueError(
                    "`gradient_checkpointing` does not go with DoRA, whose second derivative is taken through norms that a "
                    "recomputation would not find again. Turn it off, and lower `micro_batch_size` to save memory."
                )
            if args.curvature == "central_difference":
                check_full_precision(model)
            self.examples = prepare_examples(examples, args.max_length, vocab_size(model))
            check_positions(model, max(len(e.input_ids) for e in self.examples))
        self.num_tokens = sum(len(e.input_ids) for e in self.examples)
        self.num_columns = 1 + self.examples[0].candidates.shape[1]
        self.epsilon_root: float
        self.optimizer: Optimizer
        self.num_steps = args.num_steps(len(self.examples))
        self.batches = list(args.batches(len(self.examples)))
        self._collated: tuple[int, int | None, list[MicroBatch]] = (-1, None, [])

    def __enter__(self) -> "TargetRun":
        with ExitStack() as stack:
            stack.enter_context(restored(self.model))
            stack.enter_context(torch.enable_grad())
            device = self.params[0].device.type  # `bf16` decides about autocast, not the caller's context
            stack.enter_context(torch.autocast(device, enabled=False))
            make_deterministic(self.model)
            with self.processes.failing_together():
                stack.enter_context(checkpointed(self.model, self.args.gradient_checkpointing))
                with metric_memory():
                    self.metric.setup(self.model)
                    with torch.no_grad():
                        self.metric_before = evaluate(self.metric, self.model).item()
                decayed = decayed_parameters(self.model, self.params, self.args)
                self.losses = TokenLosses(self.model, self.args.bf16)
                self.flat = stack.enter_context(FlatParameters(self.params, decayed, self.processes.count))
            first = self.processes.index * self.flat.shard_size
            self.shard = (first, first + self.flat.shard_size)
            self.progress = stack.enter_context(progress_bar(self.args, self.processes, 2 * self.num_steps))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def local_batches(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        size = self.args.micro_batch_size
        if self._collated[:2] != (step, size):  # the adjoint sweep starts where the forward sweep ended
            place = self.flat.device, self.flat.dtype, self.processes.index, self.processes.count
            self._collated = step, size, micro_batches(self.examples, self.batches[step], self.args, *place)
        return self._collated[2]

    def in_memory(self, step: int, work: Callable[[list[MicroBatch]], Result]) -> Result:
        """
        Runs `work` on this process's micro-batches of a step, all over again with smaller ones where memory runs out.

        `work` ends in a sum over the processes, so that all of them try again.
        """
        while True:
            try:
                return work(self.local_batches(step))
            except OutOfMemory as error:
                reason = str(error)
            release_memory()
            batch = self.batches[step]
            supervised = sum(self.examples[i].num_supervised > 0 for i in batch)
            size = halved(self.args, -(-supervised // self.processes.count), reason)
            self.args = replace(self.args, micro_batch_size=size)
            if self.processes.index == 0:
                logger.warning(
                    "Memory ran out: from here on, %d examples at a time (`micro_batch_size`). %s", size, reason
                )

    def train(self, keep_tape: bool) -> None:
        """Fine-tunes the model; with `keep_tape`, keeps what the adjoint sweep needs."""
        flat = self.flat
        self.plan: MemoryPlan | None = None
        self.storage: Storage = DeviceStorage()
        self.training_losses: list[float] = []
        shape = self.args.num_train_epochs, len(self.examples)
        self.example_losses = torch.zeros(shape, dtype=torch.float64, device=flat.device)
        if keep_tape:
            self._open_tape_storage()
        shard = slice(*self.shard)
        taken_over = keep_tape and self.processes.count == 1
        with self.processes.failing_together():
            buffer = flat.zeros(flat.size + TAIL)
        for step in range(self.num_steps):
            losses = self.losses_of_epoch(step)
            if taken_over and step > 0 and not self.storage.copies:  # the tape has the last one
                del buffer
                flat.release_gradients()
                buffer = flat.zeros(flat.size + TAIL)
            total = self.in_memory(step, partial(self._sum_gradient, buffer, losses))
            grad = buffer[: flat.size]
            check_finite(f"the loss of step {step + 1}", torch.tensor(total))
            check_finite(f"the gradient of step {step + 1}", grad)
            if step == 0:
                self.epsilon_root = _epsilon_root(self.args, grad, sum(p.numel() for p in self.params))
                self.optimizer = _optimizer(self.args, self.epsilon_root, len(self.examples), flat.num_decayed)
                with self.processes.failing_together():
                    moments = None if self.num_steps == 1 else self.optimizer.initial_moments(flat.values)
                if keep_tape:
                    self.tape = Tape(
                        self.optimizer.shard(*self.shard),
                        self.num_steps,
                        partial(flat.load_originals, self.shard[0]),
                        self.storage,
                    )
            self.optimizer.measure(grad)
            if keep_tape:
                state = [t[shard] for t in (flat.values, *(moments or ()))]
                with self.processes.raising_later():
                    self.tape.record(state, grad if taken_over else grad[shard].clone())
            self.optimizer.update_(step, flat.values, moments, grad)
            del grad  # the tape's, if that keeps it on the device: not beside the next one
            self.training_losses.append(total)
            self.progress.update()
        flat.release_gradients()  # a metric may call `backward()`

    def _sum_gradient(self, buffer: Tensor, losses: Tensor, batches: list[MicroBatch]) -> float:
        total = [0.0]

        def prepare() -> None:
            if self.processes.count == 1:  # with several, the tape was given a copy
                self.storage.settle()  # what the buffer holds is on its way to the tape
            self.flat.accumulate_into(buffer)

        with self.processes.summing(buffer, total):
            total[0] = gradient(self.losses, self.flat, batches, losses, prepare)
        return total[0]

    def _open_tape_storage(self) -> None:
        location = "device"
        if self.num_steps > 1:  # one step leaves nothing but its gradient
            largest = max(range(self.num_steps), key=self._tokens)
            self.plan = self.in_memory(largest, self._plan)
            location = self.plan.tape
            logger.info(str(self.plan))
        with self.processes.failing_together():
            self.storage = open_storage(location, self.args.tape_dir, self.flat.device)
        self._stack.callback(self.storage.close)

    def _plan(self, batches: list[MicroBatch]) -> MemoryPlan:
        with self.processes.failing_together():
            plan = plan_memory(self.losses, self.flat, self.args, self.num_steps, batches, self.processes.count)
        return plan

    def _tokens(self, step: int) -> int:
        batch = self.batches[step]
        return len(batch) * max(len(self.examples[i].input_ids) for i in batch)

    def losses_of_epoch(self, step: int) -> Tensor:
        r"""\\( \ell_i / Z_t \\) of all examples in the epoch that a step belongs to, shape `(n,)`."""
        return self.example_losses[step * self.args.num_train_epochs // self.num_steps]

    def measure(self) -> tuple[float, dict[str, float]]:
        r"""\\( \Phi \\) of the fine-tuned model, and its read-outs."""
        with self.processes.failing_together(), metric_memory(), torch.no_grad():
            return evaluate(self.metric, self.model).item(), read_out(self.metric, self.model)

    def metric_gradient(self) -> tuple[float, Tensor, dict[str, float]]:
        r"""\\( \Phi \\) of the fine-tuned model, its gradient (this process's part of it), and read-outs."""
        with self.processes.failing_together():
            with metric_memory():
                value, cotangent = _metric_gradient(self.metric, self.model, self.flat)
                readouts = read_out(self.metric, self.model)
        if self.processes.count > 1:
            cotangent = cotangent[slice(*self.shard)].clone()
        return value, cotangent, readouts

    def derivatives(self) -> Derivatives:
        """What differentiates the loss a second time, and memory for the adjoint sweep."""
        flat, alone = self.flat, self.processes.count == 1
        self.token_metagradients = flat.zeros(self.num_tokens * self.num_columns).view(-1, self.num_columns)
        with self.processes.failing_together():
            self._values = flat.values if alone else flat.zeros(flat.shard_size)
            # The product goes where AdamW's moments were. At the first step, nothing comes of it.
            reused = self.num_steps == 1 or (alone and self.args.optim == "adamw")
            self._product = None if reused else flat.zeros(flat.size + TAIL)
        exact = Exact(self.losses, flat, self.processes)
        return exact if self.args.curvature == "exact" else CentralDifference(exact, self.args.curvature_tolerance)

    def walk_back(self, step: int, cotangent: Tensor) -> tuple[Tensor, float, Tensor | None]:
        r"""
        Walks the update of a step back: the model gets the parameters \\( \phi_t \\) before it.

        Args:
            step (`int`): Step, from 0: the last one that was not walked back.
            cotangent (`Tensor`): \\( \lambda_\phi \\) after the update, this process's part; becomes that before it.

        Returns:
            `tuple[Tensor, float, Tensor | None]`: \\( \lambda_g \\), shape `(size,)`; this process's part of
                \\( \langle \lambda_g, g_t \rangle \\); and memory for the Hessian-vector product, `None` where it is not wanted.
        """
        grad_cotangent, inner, spare = cotangent, 0.0, None
        with self.processes.raising_later():
            grad_cotangent, inner, spare = self.tape.rewind(self._values, cotangent)
        if self.optimizer.clips(step):
            total = self.processes.sum_float(inner, self.flat.device)
            with self.processes.raising_later():
                inner = self.tape.rewind_clipping(grad_cotangent, total)
        if self.processes.count > 1:
            values, grad_cotangent = self.processes.gather(self._values, grad_cotangent)
            self.flat.values.copy_(values)
        check_finite(f"the cotangent of the gradient of step {step + 1}", grad_cotangent)
        memory = spare if self._product is None else self._product
        return grad_cotangent, inner, None if step == 0 else memory

    def differentiate(
        self, step: int, derivatives: Derivatives, vector: Tensor, inner: float, memory: Tensor | None
    ) -> Tensor | None:
        r"""
        Adds a step's \\( r_{ij} \\) to `token_metagradients`, and returns this process's part of \\( H_t \lambda_g \\), in `memory`.
        """
        work = partial(
            derivatives,
            vector=vector,
            inner=inner,
            example_losses=self.losses_of_epoch(step),
            token_metagradients=self.token_metagradients,
            buffer=memory,
        )
        product = self.in_memory(step, work)
        self.progress.update()
        if product is None:
            return None
        check_finite(f"the Hessian-vector product of step {step + 1}", product)
        self.flat.release_gradients()
        return product[slice(*self.shard)]


def _epsilon_root(args: TargetTrainingArguments, grad: Tensor, num_parameters: int) -> float:
    """`"auto"`: four times the mean square of the first gradient: \\( \\sqrt{r} \\) is twice its root mean square."""
    if args.adam_epsilon_root != "auto":
        return float(args.adam_epsilon_root)
    square = grad.norm(dtype=torch.float64).item() ** 2
    if square == 0 and args.optim == "adamw":
        raise ValueError(
            '`adam_epsilon_root="auto"` needs a gradient to measure, but the first batch\'s is zero: no example in it has '
            "a supervised token, or all weights are 0. Give a number, for example 1e-9, or examples with two or more "
            "tokens."
        )
    return AUTO_EPSILON_ROOT * square / num_parameters


def _optimizer(args: TargetTrainingArguments, epsilon_root: float, num_examples: int, num_decayed: int) -> Optimizer:
    hyperparameters = [
        Hyperparameters(
            step + 1,
            learning_rate,
            args.weight_decay,
            args.adam_beta1,
            args.adam_beta2,
            args.adam_epsilon,
            epsilon_root,
        )
        for step, learning_rate in enumerate(args.learning_rates(num_examples))
    ]
    return Optimizer(args.optim, hyperparameters, num_decayed, args.max_grad_norm)


def _metric_gradient(metric: Metric, model: TargetModel, flat: FlatParameters) -> tuple[float, Tensor]:
    with torch.enable_grad(), dora_under(model, ThroughDetached()):
        value = evaluate(metric, model)
    if not value.requires_grad:
        raise ValueError(
            "`metric` returned a tensor that is cut off from the model: it does not require a gradient. Compute it from the "
            "model's trained parameters (with adapters: the adapted layers) or outputs, without `detach()`, `.item()`, "
            "`torch.no_grad()` or NumPy."
        )
    buffer = flat.accumulate_into()
    value.backward(inputs=flat.params)
    flat.release_gradients()
    grad = buffer[: flat.size]
    if grad.norm() == 0 and not grad.any():  # the second is slow
        raise ValueError(
            "`metric` does not depend on what is trained: its gradient is zero for every trainable parameter, so all "
            "metagradients would be zero. Check that it reads trained parameters (with adapters: the adapted layers), and "
            "that it is not constant or saturated."
        )
    check_finite("the gradient of `metric`", grad)
    return value.item(), grad


def check_finite(what: str, tensor: Tensor) -> None:
    if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
        raise FloatingPointError(
            f"Not finite: {what}. Lower `learning_rate`, clip with `max_grad_norm`, raise `adam_epsilon_root`, or look for a "
            "broken example."
        )


def progress_bar(args: TargetTrainingArguments, processes: Processes, total: int) -> tqdm:
    # one step is not worth a bar
    hidden = True if total == 2 or processes.index != 0 else args.disable_tqdm
    return tqdm(total=total, desc="Target", leave=False, disable=hidden)
