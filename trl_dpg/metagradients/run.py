"""One fine-tuning run of the target: the steps of the method, with memory, processes and checks around them."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from math import nan
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import release_memory
from torch import Tensor
from tqdm.auto import tqdm

from .method.central_difference import CentralDifference
from .method.exact import Direction, Exact
from .method.loss import TokenLosses, accumulate_gradient
from .method.recipe import TargetTrainingArguments
from .method.tape import Cotangent, StepInputs, Tape, tape_tensors
from .method.updates import AdamW
from .method.updates.optimizer import Block, Optimizer
from .metric import Metric, as_metric, evaluate, read_out
from .output import MetagradientOutput, TrainingOutput
from .runtime.examples import MicroBatch, micro_batches, prepare_examples
from .runtime.host import float64_device
from .runtime.memory import (
    MemoryPlan,
    OutOfMemory,
    explaining_memory,
    explaining_metric_memory,
    free_room,
    halved,
    place_tape,
    processes_here,
)
from .runtime.model import (
    TargetModel,
    check_full_precision,
    check_model,
    check_positions,
    check_whole,
    checkpointed,
    decayed_parameters,
    make_deterministic,
    restored,
    trainable_parameters,
    vocab_size,
)
from .runtime.processes import Processes
from .runtime.sharding import Shards
from .runtime.storage import Storage, open_storage
from .runtime.workspace import Workspace, parameter_groups


logger = logging.getLogger(__name__)

# `adam_epsilon_root="auto"` is this times the mean square of the first gradient. With 1, generators learn more slowly
# (experiments/results).
AUTO_EPSILON_ROOT = 4.0

Result = TypeVar("Result")


class TargetRun:
    """
    One run as a context: its forward sweep, and the steps of its adjoint sweep.

    Takes the arguments of [`~trl_dpg.metagradients.compute_metagradients`]. `measured` collects results while the run goes on. `plan`
    says where the tape lies, if there is one.
    """

    plan: MemoryPlan | None = None

    def __init__(
        self,
        model: TargetModel,
        examples: Sequence[Mapping[str, Any]],
        metric: Callable[[Any], Tensor],
        recipe: TargetTrainingArguments,
        accelerator: Accelerator | PartialState | None,
    ):
        self.model, self.metric, self.recipe = model, as_metric(metric), recipe
        self.processes = Processes(accelerator)
        with self.processes.failing_together():
            check_whole(model)
            self.shards = Shards(model, self.processes)
            self.params = trainable_parameters(model)
            with self.shards:
                check_model(model)
            if recipe.curvature == "central_difference":
                check_full_precision(model)
            self.examples = prepare_examples(examples, recipe.max_length, vocab_size(model))
            check_positions(model, max(len(e.input_ids) for e in self.examples))
        self.losses_per_token = 1 + self.examples[0].candidates.shape[1]  # its own, and its candidates'
        self.num_steps = recipe.num_steps(len(self.examples))
        self.batches = list(recipe.batches(len(self.examples)))
        self._collated: dict[int, list[MicroBatch]] = {}

    def __enter__(self) -> "TargetRun":
        with ExitStack() as stack:
            stack.enter_context(explaining_memory())
            stack.enter_context(restored(self.model))
            stack.enter_context(torch.enable_grad())
            # Autocast depends on `bf16` alone, not on the caller's context. Its cache would keep copies of weights until this outermost
            # context ends, while training changes the weights.
            stack.enter_context(torch.autocast(self.params[0].device.type, enabled=False, cache_enabled=False))
            make_deterministic(self.model)
            with self.processes.failing_together():
                stack.enter_context(checkpointed(self.model, self.recipe.gradient_checkpointing))
                decayed = decayed_parameters(self.model, self.params, self.recipe)
                groups = parameter_groups(self.recipe.rule_class, self.model, self.params, decayed, rest=AdamW)
                self.groups = self.shards.of_groups(groups)
                elementwise = all(group.rule_class.elementwise for group in groups)
                stack.enter_context(self.shards)
                self.space = Workspace(self.groups, self.processes, may_split_tape=elementwise)
                with self.space.undoing_writes(), explaining_metric_memory(), self.shards.replicated():
                    self.metric.setup(self.model)
                    with torch.no_grad():
                        before = evaluate(self.metric, self.model).item()
                self.measured = TrainingOutput(metric_before=before, metric_after=nan, adam_epsilon_root=nan)
                self.measured.micro_batch_size = self.recipe.micro_batch_size
                self.token_losses = TokenLosses(self.model, self.recipe.bf16)
                stack.enter_context(self.space)
            needed = self.num_steps > 1 and self.processes.index == 0
            bar = tqdm(
                total=self.num_steps, desc="Target", leave=False, disable=not needed or self.recipe.disable_tqdm
            )
            self.progress = stack.enter_context(bar)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def train(self, keep_tape: bool) -> None:
        """Does the forward sweep. With `keep_tape`, records the tape that the adjoint sweep needs."""
        space, processes = self.space, self.processes
        self.progress.total = (1 + keep_tape) * self.num_steps  # there, and back
        shape = self.recipe.num_train_epochs, len(self.examples)
        self.example_losses = torch.zeros(shape, dtype=torch.float64, device=float64_device(space.device))
        self.storage = Storage()
        with processes.failing_together():
            grad = space.buffer()
        for step in range(self.num_steps):
            loss = self.retrying_smaller(step, partial(self._fill_gradient, grad, self.example_losses_of(step)))
            check_finite(f"the loss of step {step + 1}", torch.tensor(loss))
            self._check_finite(f"the gradient of step {step + 1}", grad)
            if step == 0:
                self._start(grad, keep_tape)
            if self.recipe.max_grad_norm > 0:
                self.optimizer.norms.append(space.norm(grad))
            with processes.raising_later():
                if keep_tape:
                    kept = grad[space.shard].clone() if space.tape_is_split else grad
                    state = tuple(tensor[space.shard] for tensor in self._state)
                    self.tape.push(StepInputs(space.phi[space.shard], state, kept))
                for part, rule in self._blocks:
                    state = tuple(tensor[part] for tensor in self._state)
                    self.optimizer.update_(step, rule, space.phi[part], state, grad[part])
                if keep_tape and not (self.storage.copies or space.tape_is_split) and step + 1 < self.num_steps:
                    grad = space.buffer()  # the tape has taken the old buffer over
            self.measured.losses.append(loss)
            self.progress.update()
        del self._state
        space.release_gradients()  # a metric may call `backward()`

    def _start(self, grad: Tensor, keep_tape: bool) -> None:
        """Creates the optimizer, its state and the tape, which all need the first gradient."""
        space, recipe, processes = self.space, self.recipe, self.processes
        with processes.failing_together():
            self.measured.adam_epsilon_root = _epsilon_root(recipe, grad, sum(p.numel() for p in self.params), space)
            group_blocks = []
            for group, part in zip(self.groups, space.parts, strict=True):
                weight_decay = recipe.weight_decay if group.decayed else 0.0
                shape = group.params[0].shape  # a rule that reads it has a group for each parameter
                rule = group.rule_class(recipe, weight_decay, self.measured.adam_epsilon_root, shape)
                group_blocks.append(Block(part, rule))
            self.optimizer = Optimizer(group_blocks, recipe.learning_rates(len(self.examples)), recipe.max_grad_norm)
            self._blocks = self.optimizer.blocks(0, space.size, space.device)
            num_states = self.optimizer.num_states
            self._state = [torch.zeros_like(space.phi) for _ in range(num_states if self.num_steps > 1 else 0)]
            if not keep_tape:
                return
            if self.num_steps > 1:  # the tape of one step is its gradient alone, and needs no plan
                size = space.shard_size * space.phi.element_size()
                free = free_room(space.device, recipe.tape_dir, processes_here(processes.count))
                tape = tape_tensors(self.num_steps, num_states) * size
                self.plan = place_tape(recipe, tape, num_states * size, free)
                logger.info(str(self.plan))
                self.storage = open_storage(self.plan.tape, recipe.tape_dir, space.device)
                self._stack.callback(self.storage.close)
            blocks = self.optimizer.blocks(space.shard.start, space.shard.stop, space.device)
            self.tape = Tape(self.optimizer, blocks, self.num_steps, space.load_originals, self.storage)

    def _fill_gradient(self, buffer: Tensor, losses: Tensor, batches: list[MicroBatch]) -> float:
        """Writes the batch's gradient over all processes to `buffer`, and returns the loss."""
        total = [0.0]

        @cache  # once, since it zeroes the buffer, but late, since the tape may still be copying the last step's gradient out of it
        def claim_buffer() -> None:
            self.storage.settle()
            self.space.accumulate_into(buffer)

        with self.processes.summing_over_processes(buffer, total):
            total[0] = accumulate_gradient(self.token_losses, self.space, batches, losses, claim_buffer)
            claim_buffer()  # for a process without micro-batches
        return total[0]

    def measure(self) -> None:
        r"""Measures \\( \Phi \\) and the read-outs of the fine-tuned model."""
        with self.processes.failing_together(), explaining_metric_memory(), self.shards.replicated(), torch.no_grad():
            self.measured.metric_after = evaluate(self.metric, self.model).item()
            self.measured.readouts = read_out(self.metric, self.model)

    def metric_gradient(self) -> Cotangent:
        r"""Measures as `measure` does, and returns the first cotangents: \\( \lambda_\phi = \nabla \Phi \\), \\( \lambda_s = 0 \\)."""
        space = self.space
        with self.processes.failing_together():
            with explaining_metric_memory(), self.shards.replicated():
                self.measured.metric_after, grad = _metric_gradient(self.metric, self.model, space)
                self.measured.readouts = read_out(self.metric, self.model)
            space.start_adjoint(self.num_steps)
            num_tokens = sum(len(e.input_ids) for e in self.examples)
            self.token_metagradients = space.zeros(num_tokens, self.losses_per_token)
            return Cotangent(grad[space.shard].clone() if space.tape_is_split else grad, self.tape)

    def differentiator(self) -> Exact | CentralDifference:
        """What differentiates losses along a direction, as the recipe's `curvature` says."""
        exact = Exact(self.token_losses, self.space)
        is_exact = self.recipe.curvature == "exact"
        return exact if is_exact else CentralDifference(exact, self.recipe.curvature_tolerance)

    def walk_back_update(self, step: int, cotangent: Cotangent) -> Direction:
        r"""
        Does the adjoint of a step's update, and returns \\( \lambda_g \\). `cotangent` becomes that before the step, and \\( \phi_t \\)
        is loaded into the model. At the first step, \\( \lambda_\phi \\) is not needed any more, so \\( \lambda_g \\) takes its memory.
        """
        space = self.space
        of_grad = cotangent.phi if step == 0 else space.grad_cotangent
        dot_with_grad = 0.0  # stays so if the block raises: all processes learn of that in the sum
        with self.processes.raising_later():
            dot_with_grad = self.optimizer.adjoint_(self.tape, space.own_phi, cotangent, of_grad)
        dot_with_grad = space.sum_if_split(dot_with_grad)
        if self.optimizer.clip_factor(step) < 1:
            with self.processes.raising_later():
                dot_with_grad = self.optimizer.clipping_adjoint_(self.tape, of_grad, dot_with_grad)
            dot_with_grad = space.sum_if_split(dot_with_grad)
        with self.processes.raising_later():
            self.tape.pop()
        vector = space.gather_and_load_phi(of_grad)
        self._check_finite(f"the cotangent of the gradient of step {step + 1}", vector)
        return Direction(vector, dot_with_grad, self.example_losses_of(step))

    def add_token_metagradients(
        self, step: int, differentiator: Exact | CentralDifference, direction: Direction
    ) -> Tensor | None:
        r"""
        Adds a step's part of \\( r_{ij} \\) to `token_metagradients`. Returns this process's shard of \\( H_t \lambda_g \\), or `None`
        at the first step, where it is not needed.
        """
        hessian_product = self.space.hessian_product if step > 0 else None

        def work(batches: list[MicroBatch]) -> Iterable[tuple[MicroBatch, Tensor]]:
            return zip(batches, differentiator(batches, direction, hessian_product), strict=True)

        for batch, result in self.retrying_smaller(step, work):
            self.token_metagradients[batch.token_indices()] += result
        self.progress.update()
        if hessian_product is None:
            return None
        self._check_finite(f"the Hessian-vector product of step {step + 1}", hessian_product)
        self.space.release_gradients()
        return hessian_product[self.space.shard]

    def result(
        self, given: Sequence[Mapping[str, Any]], differentiator: Exact | CentralDifference
    ) -> MetagradientOutput:
        """All results, with a row for each token of the `given` examples: zeros for padding, and beyond `max_length`."""
        rows = self.processes.sum_(self.token_metagradients).cpu().split([len(e.input_ids) for e in self.examples])
        padded = [
            F.pad(part, (0, 0, example.start, len(whole["input_ids"]) - example.start - len(part)))
            for part, example, whole in zip(rows, self.examples, given, strict=True)
        ]
        candidates = [part[:, 1 : 1 + e.num_candidates].float() for part, e in zip(padded, self.examples, strict=True)]
        return MetagradientOutput(
            metagradients=torch.stack([part[:, 0].double().sum() for part in rows]).float(),
            token_metagradients=[part[:, 0].float() for part in padded],
            candidate_metagradients=candidates if self.losses_per_token > 1 else None,
            plan=self.plan,
            curvature_errors=differentiator.errors[::-1],
            num_exact_fallbacks=differentiator.num_fallbacks,
            **vars(self.measured),
        )

    def _check_finite(self, what: str, flat: Tensor) -> None:
        with self.processes.raising_later():  # one process's shard may be finite, and another's not
            check_finite(what, flat)

    def example_losses_of(self, step: int) -> Tensor:
        r"""\\( \ell_i / Z_t \\) of all examples in the epoch that a step belongs to, shape `(n,)`."""
        return self.example_losses[step * self.recipe.num_train_epochs // self.num_steps]

    def retrying_smaller(self, step: int, work: Callable[[list[MicroBatch]], Result]) -> Result:
        """
        Runs `work` on this process's micro-batches of a step. If memory runs out, starts again with smaller micro-batches.

        `work` must end in a sum over the processes, so that all of them start again together.
        """
        while True:
            try:
                return work(self._local_batches(step))
            except OutOfMemory as error:
                reason = str(error)
            self._collated.clear()
            release_memory()
            supervised = sum(self.examples[i].num_supervised > 0 for i in self.batches[step])
            share = -(-supervised // self.processes.count)
            size = halved(self.recipe, self.measured.micro_batch_size, share, reason)
            self.measured.micro_batch_size = size
            if self.processes.index == 0:
                logger.warning(
                    "Memory ran out: from here on, %d examples at a time (`micro_batch_size`). %s", size, reason
                )

    def _local_batches(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        if step not in self._collated:
            how = self.recipe, self.measured.micro_batch_size, self.space.phi, self.processes
            self._collated[step] = micro_batches(self.examples, self.batches[step], *how)
        return [batch.to(self.space.device) for batch in self._collated[step]]


def _epsilon_root(recipe: TargetTrainingArguments, grad: Tensor, num_parameters: int, space: Workspace) -> float:
    """The value of `adam_epsilon_root`. With `"auto"`, \\( \\sqrt{r} \\) is twice the root mean square of the first gradient."""
    if recipe.adam_epsilon_root != "auto":
        return float(recipe.adam_epsilon_root)
    square = grad.to(float64_device(grad.device)).norm(dtype=torch.float64).item() ** 2
    if space.processes.in_step:  # the model is in shards, and this is the gradient of this process's part
        square = space.processes.sum_float(square)
    if square == 0 and recipe.rule_class.needs_epsilon_root:
        raise ValueError(
            '`adam_epsilon_root="auto"` needs a gradient to measure, but the gradient of the first batch is zero: no example in it '
            "has a supervised token, or all weights are 0. Give a number, for example 1e-9, or examples with two or more tokens."
        )
    return AUTO_EPSILON_ROOT * square / num_parameters


def _metric_gradient(metric: Metric, model: TargetModel, space: Workspace) -> tuple[float, Tensor]:
    with torch.enable_grad():
        value = evaluate(metric, model)
    if not value.requires_grad:
        raise ValueError(
            "`metric` returned a tensor that is cut off from the model: it does not require a gradient. Compute the value from "
            "the model's trained parameters (with adapters: the adapted layers) or outputs, without `detach()`, `.item()`, "
            "`torch.no_grad()` or NumPy."
        )
    grad = space.buffer()
    space.accumulate_into(grad)
    value.backward(inputs=space.params)
    space.release_gradients()
    if space.norm(grad) == 0:
        raise ValueError(
            "`metric` does not depend on what is trained: its gradient is zero for every trainable parameter, so all "
            "metagradients would be zero. Check that it reads trained parameters (with adapters: the adapted layers), and "
            "that its value is not constant or saturated."
        )
    check_finite("the gradient of `metric`", grad)
    return value.item(), grad


def check_finite(what: str, tensor: Tensor) -> None:
    if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
        raise FloatingPointError(
            f"Not finite: {what}. Lower `learning_rate`, clip with `max_grad_norm`, raise `adam_epsilon_root`, or look for a "
            "broken example."
        )
