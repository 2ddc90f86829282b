r"""
Metagradients by one backward pass through a whole unrolled fine-tuning run.

Training is written as a differentiable program of the examples' weights, every step's graph is kept, and autograd
differentiates the metric at its end. Nothing of the engine is used but the recipe's batches and learning rates, which
makes this an independent reference, and the naive peer: its memory grows with the number of steps.
"""

from collections.abc import Callable, Mapping, Sequence
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

    Raises:
        [`NotImplementedError`]: If weight decay is to spare normalization weights and biases.
    """
    if not args.weight_decay_on_norm_and_bias:
        raise NotImplementedError(
            "`weight_decay_on_norm_and_bias` is False, but here everything decays. Set it to True."
        )
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    some = next(iter(params.values()))
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    given = [example.get("weight", 1.0) for example in examples]
    weights = torch.tensor(given, dtype=some.dtype, device=some.device, requires_grad=True)
    epsilon_root = args.adam_epsilon_root
    was_training = model.training
    model.eval()  # no dropout
    with sdpa_kernel(SDPBackend.MATH):  # the kernel that can be differentiated twice
        rates = args.learning_rates(len(examples))
        for t, (batch, rate) in enumerate(zip(args.batches(len(examples)), rates, strict=True), start=1):
            rows = [examples[i] for i in batch]
            loss = _call(model, params, lambda m, rows=rows, w=weights[batch]: _batch_loss(m, rows, w, args))
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
        (metagradients,) = torch.autograd.grad(value, weights)
    model.train(was_training)
    return metagradients, value.item()


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


def _batch_loss(model: Any, rows: list[Mapping[str, Any]], weights: Tensor, args: TargetTrainingArguments) -> Tensor:
    r"""\\( L = \sum_i w_i \ell_i / Z \\) over the examples of a batch."""
    ids = [torch.tensor(row["input_ids"][: args.max_length]) for row in rows]
    labels = [torch.tensor(row.get("labels", row["input_ids"])[: args.max_length]) for row in rows]
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(weights.device)
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(weights.device)[:, 1:]
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # causal: padding on the right changes nothing
    sums = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(dim=1)
    counts = (targets != -100).sum(dim=1)
    examples = (counts > 0).sum()
    if args.loss_normalization == "batch_tokens":
        return (weights * sums).sum() / counts.sum()
    lengths = counts.clamp(min=1) if args.loss_normalization == "example" else args.max_length
    return (weights * sums / lengths).sum() / examples
