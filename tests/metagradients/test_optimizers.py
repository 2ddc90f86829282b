"""Updates against `torch.optim`, adjoints against autograd, and the tape against naively stored states."""

import math

import pytest
import torch

from trl_dpg.metagradients.optimizers import (
    Hyperparameters,
    Moments,
    Optimizer,
    adamw_adjoint,
    adamw_update_,
    clip_adjoint_,
    sgd_adjoint,
    sgd_update_,
)
from trl_dpg.metagradients.trajectory import Tape


SHAPES = [(3, 4), (5,), (2, 1, 2)]
BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8


def tensors(seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def hyperparameters(step, learning_rate=0.1, weight_decay=0.3, epsilon=EPSILON, epsilon_root=0.0):
    return Hyperparameters(step, learning_rate, weight_decay, BETA1, BETA2, epsilon, epsilon_root)


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def reference_adamw(param, first, second, grad, hp):
    """One out-of-place step, written from the formula, which autograd can differentiate."""
    first = hp.beta1 * first + (1 - hp.beta1) * grad
    second = hp.beta2 * second + (1 - hp.beta2) * grad**2
    corrected_first = first / (1 - hp.beta1**hp.step)
    corrected_second = second / (1 - hp.beta2**hp.step)
    direction = corrected_first / (torch.sqrt(corrected_second + hp.epsilon_root) + hp.epsilon)
    return param - hp.learning_rate * (direction + hp.weight_decay * param), first, second


def reference_sgd(param, grad, hp):
    return param - hp.learning_rate * (grad + hp.weight_decay * param)


def reference_clip(grads, max_norm):
    if max_norm == 0:
        return grads
    norm = torch.cat([g.flatten() for g in grads]).norm()
    return [g * torch.clamp(max_norm / (norm + 1e-6), max=1.0) for g in grads]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_update_is_that_of_torch(optim, max_grad_norm):
    """Five steps at changing learning rates, one parameter without weight decay, gradients of changing scale."""
    decays = [0.3, 0.0, 0.3]
    rates = [0.01, 0.1, 0.1, 0.05, 0.02]
    theirs = [torch.nn.Parameter(p) for p in tensors(0)]
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(theirs, decays, strict=True)]
    if optim == "adamw":
        stock = torch.optim.AdamW(groups, lr=1.0, betas=(BETA1, BETA2), eps=EPSILON)
    else:
        stock = torch.optim.SGD(groups, lr=1.0)
    table = [[hyperparameters(step + 1, lr, w) for w in decays] for step, lr in enumerate(rates)]
    ours = Optimizer(optim, table, max_grad_norm)
    params = tensors(0)
    moments = ours.initial_moments(params)
    for step, lr in enumerate(rates):
        grads = tensors(step + 1, scale=10.0 ** (step - 3))
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        for group in stock.param_groups:
            group["lr"] = lr
        stock.step()
        ours.update_(step, params, moments, grads)
        assert relative_error(params, theirs) < 1e-12


@pytest.mark.parametrize("epsilon_root", [1e-9, 1e-4, 1.0])
def test_adamw_update_with_epsilon_root(epsilon_root):
    """Against the formula, where the root matters: gradients around its square root."""
    (param, *_), (first, *_), (second, *_) = tensors(0), tensors(1, 0.0), tensors(2, 0.0)
    ours, moments = param.clone(), Moments(first.clone(), second.clone())
    for step in range(1, 6):
        grad = tensors(step + 2, scale=math.sqrt(epsilon_root))[0]
        hp = hyperparameters(step, epsilon_root=epsilon_root)
        adamw_update_(ours, grad, moments, hp)
        param, first, second = reference_adamw(param, first, second, grad, hp)
        assert relative_error([ours, *moments], [param, first, second]) < 1e-12


def test_sgd_adjoint():
    """Against autograd through the formula."""
    (param, *_), (grad, *_), (cotangent, *_) = tensors(0), tensors(1), tensors(2)
    param.requires_grad_()
    grad.requires_grad_()
    hp = hyperparameters(1)
    updated = reference_sgd(param, grad, hp)
    in_place = param.detach().clone()
    sgd_update_(in_place, grad.detach(), hp)
    assert relative_error([in_place], [updated.detach()]) < 1e-12
    assert relative_error(sgd_adjoint(cotangent, hp), torch.autograd.grad(updated, [grad, param], cotangent)) < 1e-12


@pytest.mark.parametrize("epsilon_root", [0.0, 1e-9, 1e-2])
@pytest.mark.parametrize("step", [1, 7])
def test_adamw_adjoint(step, epsilon_root):
    """All four cotangents against autograd through the formula, from nonzero moments and moment cotangents."""
    param, grad, first = (tensors(seed)[0].requires_grad_() for seed in (0, 1, 2))
    second = (tensors(3)[0] ** 2).requires_grad_()
    cotangents = [tensors(seed)[0] for seed in (4, 5, 6)]
    hp = hyperparameters(step, epsilon_root=epsilon_root)
    outputs = reference_adamw(param, first, second, grad, hp)
    expected = torch.autograd.grad(outputs, [grad, param, first, second], cotangents)
    moments = Moments(outputs[1].detach(), outputs[2].detach())
    of_grad, of_param, of_moments = adamw_adjoint(cotangents[0], Moments(*cotangents[1:]), grad.detach(), moments, hp)
    assert relative_error([of_grad, of_param, *of_moments], expected) < 1e-10


def test_adamw_adjoint_where_no_gradient_ever_was():
    """
    At epsilon_root = 0 the root has no derivative at 0. What is left is the direct path through the first moment, whose
    denominator is epsilon; elements with a gradient are as ever.
    """
    grad, cotangent = tensors(1)[0], tensors(2)[0]
    zero = torch.zeros(grad.shape, dtype=torch.bool)
    zero[1] = True
    grad[zero] = 0.0
    hp = hyperparameters(1)
    moments = Moments(torch.zeros_like(grad), torch.zeros_like(grad))
    nothing = Moments(torch.zeros_like(grad), torch.zeros_like(grad))
    param = tensors(0)[0]
    adamw_update_(param, grad, moments, hp)
    assert torch.isfinite(param).all()
    of_grad, of_param, of_moments = adamw_adjoint(cotangent, nothing, grad, moments, hp)
    assert all(torch.isfinite(t).all() for t in (of_grad, of_param, *of_moments))
    torch.testing.assert_close(of_grad[zero], -hp.learning_rate / hp.epsilon * cotangent[zero], rtol=1e-10, atol=0)

    variable = grad.clone().requires_grad_()
    updated = reference_adamw(param, *nothing, variable, hp)[0]
    (expected,) = torch.autograd.grad(updated, variable, cotangent)
    torch.testing.assert_close(of_grad[~zero], expected[~zero], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0], ids=["off", "active", "inactive"])
def test_clip_adjoint(max_norm):
    """Against autograd through the global norm of all tensors."""
    grads = [g.requires_grad_() for g in tensors(0)]
    cotangents = tensors(1)
    expected = torch.autograd.grad(reference_clip(grads, max_norm), grads, cotangents)
    actual = [c.clone() for c in cotangents]
    clip_adjoint_(actual, [g.detach() for g in grads], max_norm)
    assert relative_error(actual, expected) < 1e-10
    assert (relative_error(actual, cotangents) > 0.1) == (max_norm == 0.5)


@pytest.mark.parametrize("max_norm", [1e-8, 1.0])
def test_clip_adjoint_of_a_zero_gradient(max_norm):
    """Around a gradient of zero clipping multiplies by min(1, M / 1e-6)."""
    cotangents = tensors(1)
    actual = [c.clone() for c in cotangents]
    clip_adjoint_(actual, tensors(0, scale=0.0), max_norm)
    expected = [c * min(1.0, max_norm / 1e-6) for c in cotangents]
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 100.0], ids=["off", "active", "inactive"])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_optimizer_adjoint(optim, max_grad_norm):
    """The adjoint of a whole step, the last of three, against autograd: every input from every output."""
    decays = [0.3, 0.0, 0.1]
    table = [[hyperparameters(step, 0.1 / step, w, epsilon_root=1e-3) for w in decays] for step in (1, 2, 3)]
    optimizer = Optimizer(optim, table, max_grad_norm)
    params = tensors(0)
    moments = optimizer.initial_moments(params)
    for step in (0, 1):
        optimizer.update_(step, params, moments, tensors(10 + step))
    params = [p.requires_grad_() for p in params]
    firsts = [m.first.requires_grad_() for m in moments]
    seconds = [m.second.requires_grad_() for m in moments]
    grads = [g.requires_grad_() for g in tensors(12)]
    cotangents, moment_cotangents = tensors(20), [Moments(*c) for c in zip(tensors(21), tensors(22), strict=True)]

    clipped = reference_clip(grads, max_grad_norm)
    if optim == "sgd":
        outputs = [reference_sgd(p, g, hp) for p, g, hp in zip(params, clipped, table[2], strict=True)]
        inputs, output_cotangents, moment_cotangents = [*grads, *params], cotangents, []
    else:
        steps = zip(params, firsts, seconds, clipped, table[2], strict=True)
        outputs = [output for inputs in steps for output in reference_adamw(*inputs)]
        output_cotangents = [t for c, m in zip(cotangents, moment_cotangents, strict=True) for t in (c, *m)]
        inputs = [*grads, *params, *firsts, *seconds]
    expected = torch.autograd.grad(outputs, inputs, output_cotangents)

    detached = [g.detach() for g in grads]
    after = [Moments(m.first.detach().clone(), m.second.detach().clone()) for m in moments]
    optimizer.update_(2, [p.detach().clone() for p in params], after, detached)
    of_grads, of_params, of_moments = optimizer.adjoint(2, cotangents, moment_cotangents, detached, after)
    actual = [*of_grads, *of_params, *(m.first for m in of_moments), *(m.second for m in of_moments)]
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("num_steps", range(1, 11))
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_tape_replays_to_the_last_bit(optim, num_steps):
    """States and gradients of every step, walked backwards, equal those copied on the way."""
    table = [[hyperparameters(k + 1, 0.1 / (k + 1), epsilon_root=1e-6) for _ in SHAPES] for k in range(num_steps)]
    optimizer = Optimizer(optim, table, max_grad_norm=2.0)
    tape = Tape(optimizer, num_steps)
    params = tensors(0, dtype=torch.float32)
    moments = optimizer.initial_moments(params)
    naive = []
    for step in range(num_steps):
        grads = tensors(step + 1, dtype=torch.float32)
        naive.append([t.clone() for t in (*params, *(t for m in moments for t in m), *grads)])
        tape.record(params, moments, grads)
        optimizer.update_(step, params, moments, grads)
    for expected in reversed(naive):
        state, saved_moments, grads = tape.rewind()
        actual = [*state, *(t for m in saved_moments for t in m), *grads]
        assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))
