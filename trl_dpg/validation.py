"""Validation: what the generator's data does in an ordinary fine-tuning run."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import release_memory

from .metagradients.arguments import TargetTrainingArguments
from .metagradients.losses import MicroBatch, TokenLosses, micro_batches, prepare_examples
from .metagradients.memory import clear_frames, halved, is_out_of_memory, metric_memory
from .metagradients.metric import as_metric, read_out
from .metagradients.model import (
    TargetModel,
    check_model,
    check_positions,
    decayed_parameters,
    make_deterministic,
    restored,
    restored_parameters,
    trainable_parameters,
    vocab_size,
)


logger = logging.getLogger(__name__)


def validate(
    model: TargetModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Callable[[Any], torch.Tensor],
    args: TargetTrainingArguments,
) -> dict[str, float]:
    """
    Fine-tunes a target the ordinary way and reports the metric.

    Nothing here knows of metagradients: gradients come from `backward()`, updates from [`~torch.optim.AdamW`] or
    [`~torch.optim.SGD`], so `adam_epsilon_root` plays no part. The model is as before when the call returns. A batch that
    does not fit into memory is repeated in micro-batches of half the size, as there.

    Arguments are those of [`~trl_dpg.metagradients.compute_metagradients`].

    Returns:
        `dict[str, float]`: `metric` (of the fine-tuned model), `metric_before`, `metric_gain`, `target_loss` (mean over
        steps), `target_steps` (K) and the metric's read-outs.
    """
    params = trainable_parameters(model)
    check_model(model)
    prepared = prepare_examples(examples, args.max_length, vocab_size(model))
    check_positions(model, max(len(e.input_ids) for e in prepared))
    metric = as_metric(metric)
    with restored(model), restored_parameters(params), torch.enable_grad():
        make_deterministic(model)  # as in the reward
        with metric_memory():
            metric.setup(model)
            with torch.no_grad():
                before = float(metric(model))
        losses = _fine_tune(model, params, prepared, args)
        with metric_memory():
            with torch.no_grad():
                after = float(metric(model))
            if not math.isfinite(after) or not all(math.isfinite(loss) for loss in losses):
                raise FloatingPointError(
                    f"Not finite: a validation's metric ({after}) or losses ({losses[-1]} at last). Lower the target's "
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


def _fine_tune(model: TargetModel, params: list, examples: list, args: TargetTrainingArguments) -> list[float]:
    """Takes all steps, and returns their losses."""
    optimizer = _optimizer(model, params, args)
    for param in params:  # not None: a batch without a supervised token is a step too, as in the reward
        param.grad = torch.zeros_like(param)
    token_losses = TokenLosses(model, args.bf16)
    losses = []
    for batch, learning_rate in zip(args.batches(len(examples)), args.learning_rates(len(examples)), strict=True):
        while True:
            try:
                micro = micro_batches(examples, batch, args, params[0].device, params[0].dtype)
                losses.append(_backward(token_losses, micro))
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                clear_frames(error)
                release_memory()
                supervised = sum(examples[i].num_supervised > 0 for i in batch)
                args = replace(args, micro_batch_size=halved(args, supervised, str(error)))
                logger.warning("Memory ran out: now %d examples at a time. %s", args.micro_batch_size, error)
                optimizer.zero_grad(set_to_none=False)
        if args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return losses


def _optimizer(model: TargetModel, params: list, args: TargetTrainingArguments) -> torch.optim.Optimizer:
    decayed = decayed_parameters(model, params, args)
    rest = [p for p in params if not any(p is q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if args.optim == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate)
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)


def _backward(losses: TokenLosses, batches: list[MicroBatch]) -> float:
    total = 0.0
    for batch in batches:
        value = torch.sum(losses(batch) * batch.token_weights(), dtype=torch.float64)
        value.backward()
        total += value.item()
    return total
