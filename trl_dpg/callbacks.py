"""The callback that checks gradients before each optimizer step of the generator."""

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging


if TYPE_CHECKING:
    from .trainer import DatasetPolicyGradientTrainer

logger = logging.get_logger(__name__)


class FiniteStepsCallback(TrainerCallback):
    """
    Keeps gradients that are not finite, and batches whose rewards were skipped, out of the generator's weights.

    If any batch of an optimizer step was skipped, all gradients are removed, so that weights and moments stay as they are.
    With DeepSpeed, whose engine keeps the gradients to itself, the callback checks nothing.
    """

    def __init__(self, trainer: "DatasetPolicyGradientTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        trainer = self.trainer
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in params]
        is_finite = torch.isfinite(torch.nn.utils.get_total_norm(grads)) if grads else torch.tensor(True)
        if args.fp16:
            is_finite = torch.tensor(True)  # the gradient scaler skips such steps itself
        elif trainer.accelerator.num_processes > 1:
            is_finite = trainer.accelerator.reduce(is_finite.to(args.device, torch.float32), "min")
        if not is_finite:
            if args.nonfinite == "raise":
                raise FloatingPointError(
                    f"Not finite: the gradient of the generator's step {state.global_step + 1}. Lower `learning_rate` or "
                    "`max_grad_norm`, or look for a prompt that gives such a loss. To go on without such a step, set "
                    "`nonfinite='skip'`."
                )
            logger.warning(f"Step {state.global_step + 1} of the generator is skipped: its gradient is not finite.")
        if args.nonfinite == "skip":  # logged as a mean, which is the share of such steps
            trainer._metrics["train"]["nonfinite_steps"].append(float(not is_finite))
        if trainer.step_skipped or not is_finite:
            for param in params:
                param.grad = None
        trainer.step_skipped = False
