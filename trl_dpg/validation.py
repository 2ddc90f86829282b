"""Validation: the effect of the generator's data in an ordinary fine-tuning run."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import release_memory

from .metagradients.method.loss import TokenLosses
from .metagradients.method.recipe import TargetTrainingArguments
from .metagradients.method.updates import AdamW
from .metagradients.metric import as_metric, read_out
from .metagradients.runtime.examples import MicroBatch, micro_batches, prepare_examples
from .metagradients.runtime.host import double
from .metagradients.runtime.memory import OutOfMemory, explaining_metric_memory, halved
from .metagradients.runtime.model import (
    TargetModel,
    check_model,
    check_positions,
    decayed_parameters,
    make_deterministic,
    restored,
    trainable_parameters,
    vocab_size,
)
from .metagradients.runtime.processes import Processes
from .metagradients.runtime.sharding import Shards, processes_of
from .metagradients.runtime.workspace import Group, parameter_groups


logger = logging.getLogger(__name__)


def validate(
    model: TargetModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Callable[[Any], torch.Tensor],
    args: TargetTrainingArguments,
) -> dict[str, float]:
    """
    Fine-tunes a target in the ordinary way, and measures the metric.

    This run does not share code for gradients and updates with metagradients. Gradients come from `backward()`, and updates from
    PyTorch's own optimizers, such as [`~torch.optim.AdamW`]. So `adam_epsilon_root` is not used. Afterwards the model is as it was. A
    batch that does not fit into memory is repeated in micro-batches of half the size. If processes hold the model in shards, they
    share the work. Otherwise each process does all of it.

    Arguments are those of [`~trl_dpg.metagradients.compute_metagradients`].

    Returns:
        `dict[str, float]`: `metric` (of the fine-tuned model), `metric_before`, `metric_gain`, `target_loss` (mean over
        steps), `target_steps` (K) and the metric's read-outs.
    """
    processes = processes_of(model)
    shards, params = Shards(model, processes), trainable_parameters(model)
    with shards:
        check_model(model)
    prepared = prepare_examples(examples, args.max_length, vocab_size(model))
    check_positions(model, max(len(e.input_ids) for e in prepared))
    metric = as_metric(metric)
    groups = parameter_groups(args.rule_class, model, params, decayed_parameters(model, params, args), rest=AdamW)
    groups = shards.of_groups(groups)
    params = [param for group in groups for param in group.params]
    # as in a reward, whatever the caller's context is
    autocast = torch.autocast(params[0].device.type, enabled=False, cache_enabled=False)
    with restored(model), shards, _restored_parameters(params), torch.enable_grad(), autocast:
        make_deterministic(model)  # the reward does the same
        with explaining_metric_memory(), shards.replicated():
            metric.setup(model)
            with torch.no_grad():
                before = float(metric(model))
        losses = _fine_tune(model, groups, prepared, args, processes)
        with explaining_metric_memory(), shards.replicated():
            with torch.no_grad():
                after = float(metric(model))
            if not math.isfinite(after) or not all(math.isfinite(loss) for loss in losses):
                raise FloatingPointError(
                    f"Not finite: a validation's metric ({after}) or losses (the last one is {losses[-1]}). Lower the target's "
                    "learning rate, or look for a broken text."
                )
            readouts = read_out(metric, model)
    return {
        "metric": after,
        "metric_before": before,
        "metric_gain": after - before,
        "target_loss": sum(losses) / len(losses),
        "target_steps": len(losses),
        **readouts,
    }


@contextmanager
def _restored_parameters(params: list) -> Iterator[None]:
    """Restores the values of parameters on leaving."""
    originals = [p.detach().clone() for p in params]
    try:
        yield
    finally:
        with torch.no_grad():
            for param, original in zip(params, originals, strict=True):
                param.grad = None
                param.copy_(original)


def _fine_tune(
    model: TargetModel, groups: list[Group], examples: list, args: TargetTrainingArguments, processes: Processes
) -> list[float]:
    """Takes all steps, and returns their losses."""
    params: list[Any] = [param for group in groups for param in group.params]
    decays = [args.weight_decay if group.decayed else 0.0 for group in groups]
    optimizers = [g.rule_class.torch_optimizer(g.params, args, decay) for g, decay in zip(groups, decays, strict=True)]
    for param in params:  # zeros, since a batch without a supervised token is a step too, as in the reward
        param.grad = torch.zeros_like(param)
    token_losses, size = TokenLosses(model, args.bf16), args.micro_batch_size
    losses = []
    for batch, learning_rate in zip(args.batches(len(examples)), args.learning_rates(len(examples)), strict=True):
        while True:
            try:
                micro = micro_batches(examples, batch, args, size, params[0], processes)
                sums = [0.0]
                with processes.summing_over_processes(None, sums):
                    sums[0] = _backward(token_losses, [part.to(params[0].device) for part in micro])
                losses += sums
                break
            except OutOfMemory as error:
                release_memory()
                supervised = sum(examples[i].num_supervised > 0 for i in batch)
                size = halved(args, size, -(-supervised // processes.count), str(error))
                logger.warning("Memory ran out: from here on, %d examples at a time. %s", size, error)
                _zero_gradients(params)
        if args.max_grad_norm > 0:
            norm = torch.nn.utils.get_total_norm([param.grad for param in params])
            if processes.in_step:
                norm.fill_(math.sqrt(processes.sum_float(norm.item() ** 2)))
            torch.nn.utils.clip_grads_with_norm_(params, args.max_grad_norm, norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        _zero_gradients(params)
    return losses


def _zero_gradients(params: list) -> None:
    for param in params:
        param.grad.zero_()


def _backward(losses: TokenLosses, batches: list[MicroBatch]) -> float:
    total = 0.0
    for batch in batches:
        value = double(losses(batch) * batch.token_weights()).sum()
        value.backward()
        total += value.item()
    return total
