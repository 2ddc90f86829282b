"""Equations of docs/method.md that no other test holds."""

import torch

from trl_dpg.metagradients.optimizers import Hyperparameters, adamw_first_adjoint_


def test_derivative_of_a_first_adamw_step():
    rate, root = 1e-3, 1e-4
    grad = torch.tensor([0.0, 1e-3, 1e-2, 1.0], dtype=torch.float64)
    buffers = [torch.empty_like(grad) for _ in range(2)]
    step = Hyperparameters(1, rate, 0.0, 0.9, 0.95, 0.0, root)
    derivative = adamw_first_adjoint_(torch.ones_like(grad), None, grad, step, *buffers)
    torch.testing.assert_close(derivative, -rate * root / (grad**2 + root) ** 1.5)
