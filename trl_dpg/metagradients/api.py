r"""
Metagradients: how much a metric of the fine-tuned model would rise if an example's loss weight rose.

[`compute_metagradients`] is the method of "Synthetic Data for any Differentiable Target"
(https://huggingface.co/papers/2604.08423), top to bottom: train forwards, differentiate the metric, walk backwards.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import release_memory
from torch import Tensor
from tqdm.auto import tqdm

from .arguments import TargetTrainingArguments
from .curvature import CentralDifference, Exact, gradient
from .dora import ThroughDetached, dora_under, has_dora
from .flat import TAIL, FlatParameters
from .memory import MemoryPlan, OutOfMemory, halved, metric_memory, plan_memory
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
from .objective import Example, MicroBatch, TokenLosses, micro_batches, prepare_examples
from .optimizers import Hyperparameters, Optimizer
from .parallel import Processes
from .storage import DeviceStorage, Storage, open_storage
from .trajectory import Tape


logger = logging.getLogger(__name__)

# `adam_epsilon_root="auto"`, in mean squares of the first gradient. With 1 generators learn more slowly (examples/results).
AUTO_EPSILON_ROOT = 4.0

Metric = Callable[[Any], Tensor]
Result = TypeVar("Result")


@dataclass(kw_only=True)
class TrainingOutput:
    r"""
    Result of [`train_and_measure`].

    Attributes:
        metric_before (`float`):
            \\( \Phi \\) of the original model.
        metric_after (`float`):
            \\( \Phi \\) of the fine-tuned model.
        adam_epsilon_root (`float`):
            The value used, which is of interest where `"auto"` was asked for.
        micro_batch_size (`int`, *optional*):
            That of the arguments, or what was left of it after memory ran out. Worth passing on to the next run.
        losses (`list[float]`):
            Training loss of each step.
        readouts (`dict[str, float]`):
            What the metric's `readouts` returned on the fine-tuned model; empty without one.
    """

    metric_before: float
    metric_after: float
    adam_epsilon_root: float
    micro_batch_size: int | None = None
    losses: list[float] = field(default_factory=list)
    readouts: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class MetagradientOutput(TrainingOutput):
    r"""
    Result of [`compute_metagradients`].

    Attributes, beside those of [`TrainingOutput`]:
        metagradients (`Tensor`):
            \\( \mathrm{d}\Phi / \mathrm{d} w_i \\) at the examples' weights, float32 on the CPU, shape `(len(examples),)`,
            in the order of `examples`. In units of the metric per unit of weight.
        token_metagradients (`list[Tensor]`):
            \\( \mathrm{d}\Phi / \mathrm{d} w_{ij} \\), the same for a weight of each token's loss: float32 tensors on the CPU, one
            an example, shape `(tokens,)`. They sum to `metagradients`. Position j belongs to `input_ids[j]`; it is 0 for the
            first token, for tokens that are not supervised and beyond `max_length`.
        candidate_metagradients (`list[Tensor]`, *optional*):
            What the metric would gain if other tokens stood there: the derivative, at 0, in the weight of an added loss term
            \\( -\log p(v \mid x_{<j}) / Z_t \\) for each of the example's `"candidates"`, shape `(tokens, k)`; 0 where there is
            none. `None` where no example has candidates.
        plan ([`~trl_dpg.metagradients.memory.MemoryPlan`]):
            Predicted memory, and where the tape was; `None` for a run of one step, which needs no tape.
        curvature_errors (`list[float]`):
            Estimated relative error of each step's central difference; empty with `curvature="exact"`.
        num_exact_fallbacks (`int`):
            Steps whose estimate was above `curvature_tolerance`, so that they were repeated exactly.
    """

    metagradients: Tensor
    token_metagradients: list[Tensor]
    candidate_metagradients: list[Tensor] | None = None
    plan: MemoryPlan | None = None
    curvature_errors: list[float] = field(default_factory=list)
    num_exact_fallbacks: int = 0


def compute_metagradients(
    model: TargetModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Metric,
    args: TargetTrainingArguments | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> MetagradientOutput:
    r"""
    Fine-tunes a model on examples and returns each example's metagradient, exactly.

    With trainable parameters \\( \phi \\), optimizer state \\( s \\), batches \\( B_1, \dots, B_K \\) and example weights
    \\( w \\):

    $$ g_t = \nabla_\phi L_t(\phi_t; w), \quad L_t = \sum_{i \in B_t} w_i \ell_i(\phi_t) / Z_t, \quad
       (\phi_{t+1}, s_{t+1}) = U(\phi_t, s_t, g_t) $$

    $$ (\lambda_\phi, \lambda_s) \leftarrow \nabla \Phi(\phi_{K+1}), \quad \text{then for } t = K, \dots, 1: $$

    $$ \lambda_g = (\partial U / \partial g)^\top (\lambda_\phi, \lambda_s), \quad
       \lambda_\phi \leftarrow (\partial U / \partial \phi)^\top \lambda_\phi + H_t \lambda_g, \quad
       \lambda_s \leftarrow (\partial U / \partial s)^\top \lambda_s, \quad
       r_{ij} \mathrel{+}= \langle \nabla_\phi \ell_{ij}(\phi_t), \lambda_g \rangle / Z_t, \quad r_i = \sum_j r_{ij} $$

    Parameters, buffers, train/eval mode, random state and attention implementation of the model are as before when the
    call returns, also after an error.

    Where a batch does not fit into memory, on any process, it is repeated in micro-batches of half the size, and so are all
    that follow: a warning says so. That changes results by no more than rounding.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model to fine-tune. Its parameters with `requires_grad` are trained; tied ones once.
        examples (`Sequence[Mapping]`):
            Dicts with `input_ids`, optionally `labels` (-100 where not supervised; `input_ids` by default), `weight`
            (1.0 by default; \\( Z_t \\) does not depend on it) and `candidates` (integers of shape `(tokens, k)`: what else
            could stand at each position, -1 for none). `completion_mask`, `assistant_masks` and an `attention_mask` with padding at
            the ends are applied; a column that asks for more than tokens is refused.
        metric (`Callable`):
            \\( \Phi \\), higher is better: `metric(model)` returns a scalar tensor, differentiable in the trained
            parameters. May have `setup(model)`, called on the original model, and `readouts(model)`, a dict of floats.
        args ([`TargetTrainingArguments`], *optional*):
            Recipe of the fine-tuning run.
        accelerator ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`], *optional*):
            When given, every process must make the same call with the same arguments; each batch is split over the
            processes, and all of them get the whole result.

    Returns:
        [`MetagradientOutput`]

    Raises:
        [`ValueError`]: If the model, an example or the metric cannot be used; the message says why and what to do.
        [`FloatingPointError`]: If a loss, a gradient, the metric or a cotangent is not finite.
        [`MemoryError`]: If not even one example at a time fits into memory, or the tape or the metric does not; the
            message names what to lower.

    Example:

    ```python
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients

    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    >>> examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
    >>> out = compute_metagradients(model, examples, lambda model: -model.lm_head.weight.norm())
    >>> out.metagradients.shape
    torch.Size([2])

    ```
    """
    args = args or TargetTrainingArguments()
    if args.optim == "adamw" and args.adam_epsilon_root == 0:
        warnings.warn(
            "`adam_epsilon_root` is 0, as in `torch.optim.AdamW`: its update has no derivative where a gradient is zero and "
            'a huge one close by, so metagradients are ill-conditioned. Set `adam_epsilon_root` to `"auto"`, or to 1e-9.',
            stacklevel=2,
        )
    with _Run(model, examples, metric, args, accelerator) as run:
        run.train(keep_tape=True)

        # The metric of the fine-tuned model, and its gradient.
        flat, processes = run.flat, run.processes
        with processes.failing_together():
            with metric_memory():
                value, cotangent = _metric_gradient(metric, model, flat)
                readouts = _readouts(metric, model)
        if processes.count > 1:
            cotangent = cotangent[slice(*run.shard)].clone()

        # Adjoint sweep: walk the run backwards. Each process does its share of the elementwise work.
        exact = Exact(run.losses, flat, processes)
        central = CentralDifference(exact, args.curvature_tolerance)
        products = exact if args.curvature == "exact" else central
        token_metagradients = flat.zeros(run.num_tokens * run.num_columns).view(run.num_tokens, run.num_columns)
        with processes.failing_together():
            state = flat.values if processes.count == 1 else flat.zeros(flat.shard_size)
            # for the product, unless it goes where the moments were; nothing lies before the first step, which needs none
            alone = processes.count == 1 and args.optim == "adamw"
            buffer = None if alone or run.num_steps == 1 else flat.zeros(flat.size + TAIL)
        for step in reversed(range(run.num_steps)):
            grad_cotangent, inner, spare = cotangent, 0.0, None
            with processes.passing_on():
                grad_cotangent, inner, spare = run.tape.rewind(state, cotangent)
            if run.optimizer.clips(step):
                total = processes.sum_float(inner, flat.device)
                with processes.passing_on():
                    inner = run.tape.rewind_clipping(grad_cotangent, total)
            into = None
            if step > 0:
                into = spare if buffer is None else buffer
            if processes.count > 1:
                values, grad_cotangent = processes.gather(state, grad_cotangent)
                flat.values.copy_(values)
                del values
            _check_finite(f"the cotangent of the gradient of step {step + 1}", grad_cotangent)
            product = run.in_memory(
                step,
                partial(
                    products,
                    vector=grad_cotangent,
                    inner=inner,
                    example_losses=run.example_losses[step * args.num_train_epochs // run.num_steps],
                    token_metagradients=token_metagradients,
                    buffer=into,
                ),
            )
            if product is not None:
                _check_finite(f"the Hessian-vector product of step {step + 1}", product)
                cotangent += product[slice(*run.shard)]
                flat.release_gradients()
            del grad_cotangent, product, into, spare  # not beside the next ones
            run.progress.update()
        processes.sum_(token_metagradients)

    lengths = [len(example.input_ids) for example in run.examples]
    of_examples = token_metagradients.cpu().split(lengths)
    sizes = [len(example["input_ids"]) for example in examples]
    whole = [_whole(*each) for each in zip(of_examples, run.examples, sizes, strict=True)]
    candidates = [part[:, 1 : 1 + e.num_candidates].float() for part, e in zip(whole, run.examples, strict=True)]
    return MetagradientOutput(
        metagradients=torch.stack([part[:, 0].double().sum() for part in of_examples]).float(),
        token_metagradients=[part[:, 0].float() for part in whole],
        candidate_metagradients=candidates if run.num_columns > 1 else None,
        metric_before=run.metric_before,
        metric_after=value,
        adam_epsilon_root=run.epsilon_root,
        micro_batch_size=run.args.micro_batch_size,
        losses=run.training_losses,
        readouts=readouts,
        plan=run.plan,
        curvature_errors=central.errors[::-1],
        num_exact_fallbacks=central.num_fallbacks,
    )


def train_and_measure(
    model: TargetModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Metric,
    args: TargetTrainingArguments | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> TrainingOutput:
    """
    The run that [`compute_metagradients`] differentiates, without its derivatives.

    Takes the same arguments, and leaves the model as it was.
    """
    with _Run(model, examples, metric, args or TargetTrainingArguments(), accelerator) as run:
        run.train(keep_tape=False)
        with run.processes.failing_together(), metric_memory(), torch.no_grad():
            value = _evaluate(metric, model).item()
            readouts = _readouts(metric, model)
    return TrainingOutput(
        metric_before=run.metric_before,
        metric_after=value,
        adam_epsilon_root=run.epsilon_root,
        micro_batch_size=run.args.micro_batch_size,
        losses=run.training_losses,
        readouts=readouts,
    )


class _Run:
    """One fine-tuning run: what it needs while it is open, and its forward sweep."""

    def __init__(
        self,
        model: TargetModel,
        examples: Sequence[Mapping[str, Any]],
        metric: Metric,
        args: TargetTrainingArguments,
        accelerator: Accelerator | PartialState | None,
    ):
        self.model, self.metric, self.args = model, metric, args
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

    def __enter__(self) -> "_Run":
        with ExitStack() as stack:
            stack.enter_context(restored(self.model))
            stack.enter_context(torch.enable_grad())
            device = self.params[0].device.type  # `bf16` decides about autocast, not the caller's context
            stack.enter_context(torch.autocast(device, enabled=False))
            make_deterministic(self.model)
            with self.processes.failing_together():
                stack.enter_context(checkpointed(self.model, self.args.gradient_checkpointing))
                with metric_memory():
                    if hasattr(self.metric, "setup"):
                        self.metric.setup(self.model)
                    with torch.no_grad():
                        self.metric_before = _evaluate(self.metric, self.model).item()
                decayed = decayed_parameters(self.model, self.params, self.args)
                self.losses = TokenLosses(self.model, self.args.bf16)
                self.flat = stack.enter_context(FlatParameters(self.params, decayed, self.processes.count))
            first = self.processes.index * self.flat.shard_size
            self.shard = (first, first + self.flat.shard_size)
            self.progress = stack.enter_context(_progress(self.args, self.processes, 2 * self.num_steps))
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
            losses = self.example_losses[step * self.args.num_train_epochs // self.num_steps]
            if taken_over and step > 0 and not self.storage.copies:  # the tape has the last one
                del buffer
                flat.release_gradients()
                buffer = flat.zeros(flat.size + TAIL)
            total = self.in_memory(step, partial(self._sum_gradient, buffer, losses))
            grad = buffer[: flat.size]
            _check_finite(f"the loss of step {step + 1}", torch.tensor(total))
            _check_finite(f"the gradient of step {step + 1}", grad)
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
                with self.processes.passing_on():
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
            largest = max(range(self.num_steps), key=lambda step: _tokens(self, step))
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


def _whole(values: Tensor, example: Example, num_tokens: int) -> Tensor:
    """Rows of all tokens of an example as it was given: zeros for padding, and for what was cut."""
    return F.pad(values, (0, 0, example.start, num_tokens - example.start - len(values)))


def _tokens(run: _Run, step: int) -> int:
    batch = run.batches[step]
    return len(batch) * max(len(run.examples[i].input_ids) for i in batch)


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


def _evaluate(metric: Metric, model: TargetModel) -> Tensor:
    value = metric(model)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(
            f"`metric` must return a scalar tensor, got one of {what}. Reduce it, for example with `.mean()`, and return it as a tensor, without `.item()` or `float()`."
        )
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"`metric` returned {value.item()}. Check its formula on this model, and lower `learning_rate` if only the "
            "fine-tuned model gives such a value."
        )
    return value.reshape(())


def _readouts(metric: Any, model: TargetModel) -> dict[str, float]:
    return dict(metric.readouts(model)) if hasattr(metric, "readouts") else {}


def _metric_gradient(metric: Metric, model: TargetModel, flat: FlatParameters) -> tuple[float, Tensor]:
    with torch.enable_grad(), dora_under(model, ThroughDetached()):
        value = _evaluate(metric, model)
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
    _check_finite("the gradient of `metric`", grad)
    return value.item(), grad


def _check_finite(what: str, tensor: Tensor) -> None:
    if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
        raise FloatingPointError(
            f"Not finite: {what}. Lower `learning_rate`, clip with `max_grad_norm`, raise `adam_epsilon_root`, or look for a "
            "broken example."
        )


def _progress(args: TargetTrainingArguments, processes: Processes, total: int) -> tqdm:
    # one step is not worth a bar
    hidden = True if total == 2 or processes.index != 0 else args.disable_tqdm
    return tqdm(total=total, desc="Target", leave=False, disable=hidden)
