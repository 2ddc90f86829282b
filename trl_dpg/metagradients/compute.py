r"""
Metagradients: how much a metric of the fine-tuned model would rise if an example's loss weight rose.

[`compute_metagradients`] is the method of "Synthetic Data for any Differentiable Target"
(https://huggingface.co/papers/2604.08423), top to bottom: train forwards, differentiate the metric, walk backwards.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator, PartialState
from torch import Tensor

from .method.recipe import TargetTrainingArguments
from .output import MetagradientOutput, TrainingOutput
from .run import TargetRun
from .runtime.model import TargetModel


def compute_metagradients(
    model: TargetModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Callable[[Any], Tensor],
    args: TargetTrainingArguments | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> MetagradientOutput:
    r"""
    Fine-tunes a model on examples and returns each example's metagradient, exact up to rounding (unless by central differences).

    With trainable parameters \\( \phi \\), optimizer state \\( s \\), batches \\( B_1, \dots, B_K \\), example weights \\( w \\), losses
    \\( \ell_i = \sum_j \ell_{ij} \\) over an example's supervised tokens, and the Hessian \\( H_t = \nabla_\phi^2 L_t(\phi_t; w) \\):

    $$ g_t = \nabla_\phi L_t(\phi_t; w), \quad L_t = \sum_{i \in B_t} w_i \ell_i(\phi_t) / Z_t, \quad
       (\phi_{t+1}, s_{t+1}) = U(\phi_t, s_t, g_t) $$

    $$ \lambda_\phi \leftarrow \nabla \Phi(\phi_{K+1}), \; \lambda_s \leftarrow 0, \quad \text{then for } t = K, \dots, 1: $$

    $$ \lambda_g = (\partial U / \partial g)^\top (\lambda_\phi, \lambda_s), \quad
       \lambda_\phi \leftarrow (\partial U / \partial \phi)^\top (\lambda_\phi, \lambda_s) + H_t \lambda_g, \quad
       \lambda_s \leftarrow (\partial U / \partial s)^\top (\lambda_\phi, \lambda_s), \quad
       r_{ij} \mathrel{+}= \langle \nabla_\phi \ell_{ij}(\phi_t), \lambda_g \rangle / Z_t, \quad r_i = \sum_j r_{ij} $$

    \\( Z_t \\) is that of the recipe's `loss_normalization`. All right-hand sides use \\( \lambda_\phi, \lambda_s \\) from after step t.

    Afterwards the model is as it was, even after an error: parameters, buffers, mode, random state and attention implementation.
    `metric` may write to trained parameters, but not to frozen ones.

    If a batch does not fit into the memory of some process, the batch is repeated in micro-batches of half the size. Later batches
    keep the smaller size, and a warning is logged. Smaller micro-batches change results by no more than rounding.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model to fine-tune. Its parameters with `requires_grad` are trained. Tied parameters are updated once per step.
        examples (`Sequence[Mapping]`):
            Dicts with `input_ids`, optionally `labels` (-100 where not supervised; `input_ids` by default), `weight`
            (1.0 by default; \\( Z_t \\) does not depend on it) and `candidates` (integers of shape `(tokens, k)`: tokens that could
            stand at each position instead, -1 for none). `completion_mask`, `assistant_masks` and an `attention_mask` with padding
            at the ends are applied. Columns with other model inputs, such as images, are refused.
        metric (`Callable`):
            \\( \Phi \\), higher is better: `metric(model)` returns a scalar tensor, differentiable in the trained
            parameters. It may have `setup(model)`, called on the original model, and `readouts(model)`, which returns floats by name.
        args ([`TargetTrainingArguments`], *optional*):
            Recipe of the fine-tuning run.
        accelerator ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`], *optional*):
            When given, every process must make the same call with the same arguments; each batch is split over the
            processes, and all of them get the whole result.

    Raises:
        [`ValueError`]: If the model, an example or the metric cannot be used; the message says why and what to do.
        [`FloatingPointError`]: If a loss, a gradient, the metric or a cotangent is not finite.
        [`MemoryError`]: If memory runs out with one example at a time, in the metric, or for the tape. The message says what to change.

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
    if args.rule_class.needs_epsilon_root and args.adam_epsilon_root == 0:
        warnings.warn(
            "`adam_epsilon_root` is 0, as in `torch.optim.AdamW`. Its update has no derivative where a gradient is zero, and "
            "a huge one where a gradient is close to zero, so metagradients are ill-conditioned. Set `adam_epsilon_root` to "
            '`"auto"`, or to 1e-9.',
            stacklevel=2,
        )
    with TargetRun(model, examples, metric, args, accelerator) as run:
        run.train(keep_tape=True)
        cotangent = run.metric_gradient()
        differentiator = run.differentiator()
        for step in reversed(range(run.num_steps)):
            direction = run.walk_back_update(step, cotangent)  # updates `cotangent` in place, and loads phi_t
            hessian_product = run.add_token_metagradients(step, differentiator, direction)
            if hessian_product is not None:
                cotangent.phi += hessian_product
        return run.result(examples, differentiator)


def train_and_measure(
    model: TargetModel,
    examples: Sequence[Mapping[str, Any]],
    metric: Callable[[Any], Tensor],
    args: TargetTrainingArguments | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> TrainingOutput:
    """
    Fine-tunes a model and measures the metric, as [`compute_metagradients`] does, without derivatives.

    Takes the same arguments. Afterwards the model is as it was.
    """
    with TargetRun(model, examples, metric, args or TargetTrainingArguments(), accelerator) as run:
        run.train(keep_tape=False)
        run.measure()
    return run.measured
