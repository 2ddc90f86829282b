"""Second derivatives without the weights' gradients, against plain double backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trl_dpg.metagradients.linear import WithoutWeightGradients


def linear(x, weight, bias):
    return F.linear(x, weight, bias)


def conv1d(x, weight, bias):
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight.T.contiguous()).view(*x.shape[:-1], -1)


def transposed(x, weight, bias):
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("layer", [linear, conv1d, transposed])
def test_product(layer):
    """With one weight used twice, and another that is not a parameter but made of one."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 4, generator=generator).double()) for _ in range(2)]
    params.append(nn.Parameter(torch.randn(4, generator=generator).double()))
    x = torch.randn(2, 3, 4, generator=generator).double()
    directions = [torch.randn(p.shape, generator=generator).double() for p in params]

    def product():
        w, u, b = params
        hidden = torch.tanh(layer(torch.tanh(layer(x, w, b)), w, b))
        loss = layer(layer(hidden, u, b), torch.exp(u), b).square().sum()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return grads[0], torch.autograd.grad(grads, params, directions)

    grad, expected = product()
    with WithoutWeightGradients():
        zeros, actual = product()
    torch.testing.assert_close(actual, expected)
    assert grad.any() and (layer is conv1d or not zeros.any())
