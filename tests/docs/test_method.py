"""Equations of docs/method.md that no other test holds."""

import torch

from trl_dpg.metagradients import TargetTrainingArguments
from trl_dpg.metagradients.method.updates import AdamW


def test_derivative_of_a_first_adamw_step():
    rate, root = 1e-3, 1e-4
    grad = torch.tensor([0.0, 1e-3, 1e-2, 1.0], dtype=torch.float64)
    update = AdamW(TargetTrainingArguments(adam_epsilon=0.0), 0.0, root, grad.shape)
    zeros = tuple(torch.zeros_like(grad) for _ in range(2))
    derivative = update.adjoint_(0, rate, grad, zeros, grad, torch.ones_like(grad), zeros)
    torch.testing.assert_close(derivative, -rate * root / (grad**2 + root) ** 1.5)
