r"""
Metagradients by one backward pass through a whole unrolled fine-tuning run.

Training is written as a differentiable program of the examples' weights, every step's graph is kept, and autograd
differentiates the metric at its end. Nothing of the engine is used but the recipe's batches and learning rates, which
makes this an independent reference, and the naive peer: its memory grows with the number of steps.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from trl_dpg.metagradients import TargetTrainingArguments


def unrolled_metagradients(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Callable[[Any], Tensor],
    args: TargetTrainingArguments,
) -> tuple[Tensor, float]:
    r"""
    Fine-tunes differentiably and returns \\( \mathrm{d}\Phi / \mathrm{d} w_i \\) for every example, and \\( \Phi \\).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to fine-tune; its parameters with `requires_grad`, tied ones once. It is not changed.
        examples (`Sequence[Mapping]`):
            Dicts with `input_ids`, optionally `labels` and `weight`.
        metric (`Callable`):
            \\( \Phi \\): `metric(model)` returns a scalar tensor.
        args ([`TargetTrainingArguments`]):
            Recipe. What only changes cost is ignored (micro-batches). At `adam_epsilon_root=0` autograd returns NaN as
            soon as one parameter has no gradient.

    Returns:
        `tuple[Tensor, float]`: Metagradients in the dtype of the model, and the metric of the fine-tuned model.
    """
    some = next(model.parameters())
    given = [example.get("weight", 1.0) for example in examples]
    weights = torch.tensor(given, dtype=some.dtype, device=some.device, requires_grad=True)
    token_weights = [w.expand(len(example["input_ids"])) for w, example in zip(weights, examples, strict=True)]
    value = unrolled_metric(model, examples, metric, args, token_weights)
    (metagradients,) = torch.autograd.grad(value, weights)
    return metagradients, value.item()


def unrolled_metric(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Callable[[Any], Tensor],
    args: TargetTrainingArguments,
    token_weights: Sequence[Tensor],
    candidate_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""
    \\( \Phi \\) of the model fine-tuned with a weight for every token's loss term, differentiable in these weights.

    Args:
        model, examples, metric, args:
            As of [`unrolled_metagradients`]; an example's own `weight` plays no part.
        token_weights (`Sequence[Tensor]`):
            Of each example, shape `(tokens,)`.
        candidate_weights (`Sequence[Tensor]`, *optional*):
            Of the loss terms of each example's `candidates`, shape `(tokens, k)`.

    Raises:
        [`NotImplementedError`]: If weight decay is to spare normalization weights and biases.
    """
    if not args.weight_decay_on_norm_and_bias:
        raise NotImplementedError(
            "`weight_decay_on_norm_and_bias` is False, but here everything decays. Set it to True."
        )
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    epsilon_root = args.adam_epsilon_root
    was_training = model.training
    model.eval()  # no dropout
    with sdpa_kernel(SDPBackend.MATH):  # the kernel that can be differentiated twice
        rates = args.learning_rates(len(examples))
        for t, (batch, rate) in enumerate(zip(args.batches(len(examples)), rates, strict=True), start=1):
            rows = [examples[i] for i in batch]
            weights = [token_weights[i] for i in batch]
            others = None if candidate_weights is None else [candidate_weights[i] for i in batch]
            loss = _call(model, params, partial(_batch_loss, rows=rows, weights=weights, others=others, args=args))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
            if epsilon_root == "auto":
                flat = torch.cat([grad.detach().flatten() for grad in grads])
                epsilon_root = 4 * flat.double().square().mean().item()
            if args.max_grad_norm:
                norm = torch.cat([grad.flatten() for grad in grads]).norm()
                factor = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                grads = [factor * grad for grad in grads]
            for (name, param), grad in zip(params.items(), grads, strict=True):
                direction = grad
                if args.optim == "adamw":
                    beta1, beta2 = args.adam_beta1, args.adam_beta2
                    first[name] = beta1 * first[name] + (1 - beta1) * grad
                    second[name] = beta2 * second[name] + (1 - beta2) * grad**2
                    root = (second[name] / (1 - beta2**t) + epsilon_root).sqrt()
                    direction = first[name] / (1 - beta1**t) / (root + args.adam_epsilon)
                params[name] = param - rate * (direction + args.weight_decay * param)
        value = _call(model, params, metric)
    model.train(was_training)
    return value


class _Function(nn.Module):
    """A function of a model as a module, which is what `functional_call` takes."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Tensor]):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self) -> Tensor:
        return self.function(self.model)


def _call(model: nn.Module, params: dict[str, Tensor], function: Callable[[Any], Tensor]) -> Tensor:
    """Value of a function of the model at other parameters."""
    return functional_call(_Function(model, function), {f"model.{name}": p for name, p in params.items()}, ())


def _batch_loss(
    model: Any,
    rows: list[Mapping[str, Any]],
    weights: list[Tensor],
    others: list[Tensor] | None,
    args: TargetTrainingArguments,
) -> Tensor:
    r"""\\( L = \sum_{ij} w_{ij} \ell_{ij} / Z \\) over the tokens of a batch, and its candidates' terms."""
    device = weights[0].device
    ids = [torch.tensor(row["input_ids"][: args.max_length]) for row in rows]
    labels = [torch.tensor(row.get("labels", row["input_ids"])[: args.max_length]) for row in rows]
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(device)[:, 1:]
    padded = nn.utils.rnn.pad_sequence([w[: args.max_length] for w in weights], batch_first=True)[:, 1:]
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # causal: padding on the right changes nothing
    terms = padded * F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    if others is not None:
        log_probs = logits.log_softmax(dim=-1)
        for i, (row, w) in enumerate(zip(rows, others, strict=True)):
            candidates = torch.as_tensor(row["candidates"])[1 : args.max_length].to(device)
            length = len(candidates)
            added = -log_probs[i, :length].gather(1, candidates.clamp(min=0)) * w[1 : args.max_length]
            counted = (targets[i, :length, None] != -100) & (candidates >= 0)
            terms = terms + F.pad(torch.where(counted, added, 0).sum(dim=1), (0, terms.shape[1] - length)) * (
                torch.arange(len(rows), device=device) == i
            ).unsqueeze(1)
    counts = (targets != -100).sum(dim=1)
    examples = (counts > 0).sum()
    if args.loss_normalization == "batch_tokens":
        return terms.sum() / counts.sum()
    lengths = counts.clamp(min=1) if args.loss_normalization == "example" else args.max_length
    return (terms.sum(dim=1) / lengths).sum() / examples
