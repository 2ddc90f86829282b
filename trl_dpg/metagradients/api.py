r"""
Metagradients: how much a metric of the fine-tuned model would rise if an example's loss weight rose.

[`compute_metagradients`] is the method of "Synthetic Data for any Differentiable Target"
(https://huggingface.co/papers/2604.08423), top to bottom: train forwards, differentiate the metric, walk backwards.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from .arguments import TargetTrainingArguments
from .curvature import example_derivatives, gradient, hessian_vector_product, twice_differentiable_attention
from .model import (
    TargetModel,
    check_positions,
    decayed_parameters,
    make_deterministic,
    restored,
    trainable_parameters,
    vocab_size,
)
from .objective import micro_batches, prepare_examples
from .optimizers import Hyperparameters, Optimizer
from .parallel import failing_together, sum_over_processes
from .trajectory import Tape


Metric = Callable[[Any], Tensor]


@dataclass
class MetagradientOutput:
    r"""
    Result of [`compute_metagradients`].

    Attributes:
        metagradients (`Tensor`):
            \\( \mathrm{d}\Phi / \mathrm{d} w_i \\) at the examples' weights, float32 on the CPU, shape `(len(examples),)`,
            in the order of `examples`. In units of the metric per unit of weight.
        metric_before (`float`):
            \\( \Phi \\) of the original model.
        metric_after (`float`):
            \\( \Phi \\) of the fine-tuned model.
        adam_epsilon_root (`float`):
            The value used, which is of interest where `"auto"` was asked for.
        losses (`list[float]`):
            Training loss of each step.
        readouts (`dict[str, float]`):
            What the metric's `readouts` returned on the fine-tuned model; empty without one.
    """

    metagradients: Tensor
    metric_before: float
    metric_after: float
    adam_epsilon_root: float
    losses: list[float] = field(default_factory=list)
    readouts: dict[str, float] = field(default_factory=dict)


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
       r_i \mathrel{+}= \langle \nabla_\phi \ell_i(\phi_t), \lambda_g \rangle / Z_t $$

    Parameters, buffers, train/eval mode, random state and attention implementation of the model are as before when the
    call returns, also after an error.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model to fine-tune. Its parameters with `requires_grad` are trained; tied ones once.
        examples (`Sequence[Mapping]`):
            Dicts with `input_ids`, optionally `labels` (-100 where not supervised; `input_ids` by default) and `weight`
            (1.0 by default; \\( Z_t \\) does not depend on it).
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
            'a huge one close by, so metagradients are ill-conditioned. Set `adam_epsilon_root` to 1e-9 or `"auto"`.',
            stacklevel=2,
        )
    with failing_together(accelerator):
        params = trainable_parameters(model)
        prepared = prepare_examples(examples, args.max_length, vocab_size(model))
        check_positions(model, max(len(e.input_ids) for e in prepared))

    process = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device, dtype = params[0].device, params[0].dtype
    num_steps = args.num_steps(len(prepared))
    batches = list(args.batches(len(prepared)))

    def local_batches(step):
        return micro_batches(prepared, batches[step], args, device, dtype, *process)

    with restored(model, params), torch.enable_grad(), _progress(args, accelerator, 2 * num_steps) as progress:
        make_deterministic(model)
        with failing_together(accelerator):
            if hasattr(metric, "setup"):
                metric.setup(model)
            with torch.no_grad():
                metric_before = _evaluate(metric, model).item()

        # Forward sweep: fine-tune, keeping what the adjoint needs.
        losses = []
        for step in range(num_steps):
            with failing_together(accelerator):
                loss, grads = gradient(model, params, local_batches(step))
            *grads, total = sum_over_processes([*grads, grads[0].new_tensor([loss])], accelerator)
            losses.append(total.item())
            _check_finite(f"the loss or the gradient of step {step + 1}", [total, *grads])
            if step == 0:
                epsilon_root = _epsilon_root(args, grads)
                optimizer = _optimizer(model, params, args, epsilon_root, len(prepared))
                moments = optimizer.initial_moments(params)
                tape = Tape(optimizer, num_steps)
            tape.record(params, moments, grads)
            with torch.no_grad():
                optimizer.update_(step, params, moments, grads)
            progress.update()

        # The metric of the fine-tuned model, and its gradient.
        with failing_together(accelerator):
            value, cotangents = _metric_gradient(metric, model, params)
            readouts = dict(metric.readouts(model)) if hasattr(metric, "readouts") else {}

        # Adjoint sweep: walk the run backwards.
        metagradients = torch.zeros(len(prepared), dtype=torch.float64, device=device)
        moment_cotangents = optimizer.initial_moments(params)
        for step in reversed(range(num_steps)):
            moments_after = moments
            state, moments, grads = tape.rewind()
            with torch.no_grad():
                for param, saved in zip(params, state, strict=True):
                    param.copy_(saved)
                grad_cotangents, cotangents, moment_cotangents = optimizer.adjoint(
                    step, cotangents, moment_cotangents, grads, moments_after
                )
            _check_finite(f"the cotangent of the gradient of step {step + 1}", grad_cotangents)
            with failing_together(accelerator), twice_differentiable_attention(model):
                local = local_batches(step)
                if step == 0:  # nothing lies before: only the metagradients are needed
                    example_derivatives(model, params, local, grad_cotangents, metagradients)
                else:
                    product = hessian_vector_product(model, params, local, grad_cotangents, metagradients)
            if step > 0:
                product = sum_over_processes(product, accelerator)
                _check_finite(f"the Hessian-vector product of step {step + 1}", product)
                for cotangent, part in zip(cotangents, product, strict=True):
                    cotangent.add_(part)
            progress.update()

    (metagradients,) = sum_over_processes([metagradients], accelerator)
    return MetagradientOutput(metagradients.float().cpu(), metric_before, value, epsilon_root, losses, readouts)


def _epsilon_root(args: TargetTrainingArguments, grads: list[Tensor]) -> float:
    """`"auto"`: the mean square of the first gradient, so that \\( \\sqrt{r} \\) is its root mean square."""
    if args.adam_epsilon_root != "auto":
        return float(args.adam_epsilon_root)
    squares = sum(g.double().square().sum().item() for g in grads)
    if squares == 0:
        raise ValueError(
            '`adam_epsilon_root="auto"` needs a gradient to measure, but the first batch\'s is zero: no example in it has '
            "a supervised token, or all weights are 0. Give a number, for example 1e-9, or examples with two or more "
            "tokens."
        )
    return squares / sum(g.numel() for g in grads)


def _optimizer(model, params, args, epsilon_root, num_examples) -> Optimizer:
    decayed = {id(p) for p in decayed_parameters(model, params, args)}
    hyperparameters = [
        [
            Hyperparameters(
                step + 1,
                learning_rate,
                args.weight_decay if id(p) in decayed else 0.0,
                args.adam_beta1,
                args.adam_beta2,
                args.adam_epsilon,
                epsilon_root,
            )
            for p in params
        ]
        for step, learning_rate in enumerate(args.learning_rates(num_examples))
    ]
    return Optimizer(args.optim, hyperparameters, args.max_grad_norm)


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


def _metric_gradient(metric: Metric, model: TargetModel, params: list[nn.Parameter]) -> tuple[float, list[Tensor]]:
    with torch.enable_grad():
        value = _evaluate(metric, model)
    if not value.requires_grad:
        raise ValueError(
            "`metric` returned a tensor that is cut off from the model: it does not require a gradient. Compute it from the "
            "model's trained parameters (with adapters: the adapted layers) or outputs, without `detach()`, `.item()`, "
            "`torch.no_grad()` or NumPy."
        )
    parts = torch.autograd.grad(value, params, allow_unused=True)
    if all(g is None or not g.any() for g in parts):
        raise ValueError(
            "`metric` does not depend on what is trained: its gradient is zero for every trainable parameter, so all "
            "metagradients would be zero. Check that it reads trained parameters (with adapters: the adapted layers), and "
            "that it is not constant or saturated."
        )
    grads = [torch.zeros_like(p) if g is None else g.detach().clone() for g, p in zip(parts, params, strict=True)]
    _check_finite("the gradient of `metric`", grads)
    return value.item(), grads


def _check_finite(what: str, tensors: list[Tensor]) -> None:
    if not all(torch.isfinite(t.sum()) or torch.isfinite(t).all() for t in tensors):
        raise FloatingPointError(
            f"Not finite: {what}. Lower `learning_rate`, clip with `max_grad_norm`, raise `adam_epsilon_root`, or look for a "
            "broken example."
        )


def _progress(args, accelerator, total) -> tqdm:
    hidden = args.disable_tqdm
    if total == 2 or (accelerator is not None and accelerator.process_index != 0):
        hidden = True  # one step is not worth a bar
    return tqdm(total=total, desc="Target", leave=False, disable=hidden)
