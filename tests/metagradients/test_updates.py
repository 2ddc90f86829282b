"""Updates against `torch.optim`, adjoints against autograd, a whole run's update in parts against the whole."""

import math

import pytest
import torch

from trl_dpg.metagradients import TargetTrainingArguments
from trl_dpg.metagradients.method.tape import Cotangent, StepInputs, Tape
from trl_dpg.metagradients.method.updates import SGD, AdamW, Muon
from trl_dpg.metagradients.method.updates.optimizer import Block, Optimizer
from trl_dpg.metagradients.runtime.storage import Storage
from trl_dpg.metagradients.runtime.workspace import ALIGNMENT


SHAPE = torch.Size((4, 3))
SIZE = 12
RULES = {
    "adamw": (AdamW, {}),
    "sgd": (SGD, {"optim": "sgd"}),
    "momentum": (SGD, {"optim": "sgd", "momentum": 0.8}),
    "nesterov": (SGD, {"optim": "sgd", "momentum": 0.8, "nesterov": True}),
    "muon": (Muon, {"optim": "muon"}),
    "muon, plain": (Muon, {"optim": "muon", "momentum": 0.7, "nesterov": False}),
}


def tensor(seed, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def make_rule(name="adamw", weight_decay=0.3, epsilon_root=0.0, **fields):
    rule, own = RULES[name]
    recipe = TargetTrainingArguments(adam_beta1=0.9, adam_beta2=fields.pop("beta2", 0.95), **own, **fields)
    return rule(recipe, weight_decay, epsilon_root, SHAPE)


def zeros(rule, count=None):
    return tuple(torch.zeros(SIZE, dtype=torch.float64) for _ in range(rule.num_states if count is None else count))


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def orthogonalized(matrix):
    """By the iteration's effect on singular values."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def reference(rule, step, rate, phi, state, grad):
    """One out-of-place step, written from the formula, which autograd can differentiate. Returns parameters and state."""
    if isinstance(rule, SGD):
        grad = grad + rule.weight_decay * phi
        if not state:
            return (phi - rate * grad,)
        buffer = rule.momentum * state[0] + grad
        direction = grad + rule.momentum * buffer if rule.recipe.nesterov else buffer
        return phi - rate * direction, buffer
    if isinstance(rule, Muon):
        buffer = rule.momentum * state[0] + (1 - rule.momentum) * grad
        direction = (1 - rule.momentum) * grad + rule.momentum * buffer if rule.nesterov else buffer
        direction = orthogonalized(direction.view(SHAPE)).flatten() * 0.2 * math.sqrt(max(SHAPE))
        return phi - rate * (direction + rule.weight_decay * phi), buffer
    beta1, beta2, root = rule.beta1, rule.recipe.adam_beta2, rule.epsilon_root
    first, second = state
    second = second - (1 - beta2**step) * root  # ours has it in it, on the way in and out
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad**2
    corrected = second / (1 - beta2 ** (step + 1))
    direction = first / (1 - beta1 ** (step + 1)) / (torch.sqrt(corrected + root) + rule.epsilon)
    return phi - rate * (direction + rule.weight_decay * phi), first, second + (1 - beta2 ** (step + 1)) * root


# Updates


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("name", RULES)
def test_update_is_that_of_torch(name, max_grad_norm, monkeypatch):
    """Five steps at changing learning rates, with gradients of changing scale, of a matrix with and one without weight decay."""
    # PyTorch's Muon rounds its matrices to bfloat16: by this method, and by `to` from 2.15 on
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr(torch, "bfloat16", torch.float64)
    rates = [0.01, 0.1, 0.1, 0.05, 0.02]
    rules = [make_rule(name, weight_decay) for weight_decay in (0.3, 0.0)]
    ours = [tensor(0), tensor(1)]
    theirs = [torch.nn.Parameter(t.view(SHAPE).clone()) for t in ours]
    stock = [rule.torch_optimizer([p], rule.recipe, rule.weight_decay) for rule, p in zip(rules, theirs, strict=True)]
    states, optimizer = [zeros(rule) for rule in rules], Optimizer([], rates, max_grad_norm)
    for step, rate in enumerate(rates):
        grads = [tensor(10 * step + i, scale=10.0 ** (step - 3)) for i in (2, 3)]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.view(SHAPE).clone()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        for other in stock:
            other.param_groups[0]["lr"] = rate
            other.step()
        optimizer.norms.append(torch.cat(grads).norm().item())
        for rule, phi, state, grad in zip(rules, ours, states, grads, strict=True):
            optimizer.update_(step, rule, phi, state, grad)
        assert relative_error(ours, [p.detach().flatten() for p in theirs]) < 1e-12


def test_adamw_is_that_of_torch_to_the_last_bit():
    phi, rule = tensor(0, dtype=torch.float32), make_rule(weight_decay=0.3)
    param, state = torch.nn.Parameter(phi.clone()), tuple(torch.zeros(SIZE) for _ in range(2))
    stock = torch.optim.AdamW([param], 0.1, (0.9, 0.95), weight_decay=0.3, fused=True)
    for step in range(5):
        param.grad = tensor(step, dtype=torch.float32)
        stock.step()
        rule.update_(step, 0.1, phi, state, param.grad)
        assert torch.equal(phi, param.detach())


@pytest.mark.parametrize("epsilon_root", [0.0, 1e-9, 1e-4, 1.0])
@pytest.mark.parametrize("beta2", [0.0, 0.95])
@pytest.mark.parametrize("name", RULES)
def test_update_is_its_formula(name, beta2, epsilon_root):
    """With gradients around the root of `epsilon_root`, where that matters."""
    rule = make_rule(name, beta2=beta2, epsilon_root=epsilon_root)
    phi, expected = tensor(0), (tensor(0), *zeros(rule))
    state = zeros(rule)
    for step in range(5):
        grad = tensor(step + 2, scale=math.sqrt(epsilon_root or 1.0))
        rule.update_(step, 0.1, phi, state, grad)
        expected = reference(rule, step, 0.1, expected[0], expected[1:], grad)
        assert relative_error([phi, *state], expected) < 1e-11


def test_adamw_update_whatever_the_default_dtype():
    """A step above 256 is not a bfloat16."""
    rule, found = make_rule(beta2=0.999), []
    for dtype in (torch.float32, torch.bfloat16):
        phi, grad = (tensor(seed, dtype=torch.float32) for seed in (0, 1))
        torch.set_default_dtype(dtype)
        try:
            rule.update_(301, 0.1, phi, (grad.clone(), grad**2), grad)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(phi)
    assert torch.equal(*found)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in RULES if "muon" not in name])
def test_update_of_parts(name, dtype, num_threads):
    """To the last bit that of the whole, whatever the number of threads: parts as `Workspace` cuts them."""
    rule = make_rule(name, epsilon_root=1e-3)
    whole = [t.abs() for t in torch.randn(4, 64 * 512, generator=torch.Generator().manual_seed(0), dtype=dtype)]
    parts = [t.clone() for t in whole]
    before = torch.get_num_threads()
    rule.update_(2, 0.1, whole[0], tuple(whole[2 : 2 + rule.num_states]), whole[1])
    torch.set_num_threads(num_threads)
    try:
        for phi, grad, *state in zip(*(t.split(ALIGNMENT * 37) for t in parts), strict=True):
            rule.update_(2, 0.1, phi, tuple(state[: rule.num_states]), grad)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, parts, whole))


# Adjoints


@pytest.mark.parametrize("epsilon_root", [0.0, 1e-9, 1e-2])
@pytest.mark.parametrize("step", [0, 1, 6])
@pytest.mark.parametrize("name", RULES)
def test_adjoint(name, step, epsilon_root):
    """All cotangents against autograd through the formula, from a state and its cotangents that are not zero."""
    rule = make_rule(name, epsilon_root=epsilon_root)
    phi, grad = tensor(0).requires_grad_(), tensor(1).requires_grad_()
    state = [tensor(2), tensor(3) ** 2 + epsilon_root][: rule.num_states] if step > 0 else list(zeros(rule))
    state = [t.requires_grad_() for t in state]
    cotangents = [tensor(seed) for seed in (4, 5, 6)][: 1 + rule.num_states]
    outputs = reference(rule, step, 0.1, phi, state, grad)
    expected = torch.autograd.grad(outputs, [grad, phi, *state], cotangents, allow_unused=True)
    before = tuple(t.detach().clone() for t in state)
    of_phi, *of_state = cotangents
    of_grad = rule.adjoint_(step, 0.1, phi.detach(), before, grad.detach(), of_phi, tuple(of_state))
    actual = [of_grad, of_phi, *(of_state if step > 0 else [])]  # nothing lies before the first step
    # At the first step, autograd subtracts terms that agree in up to 10 of 16 digits.
    assert relative_error(actual, expected[: len(actual)]) < (1e-6 if step == 0 else 1e-9)
    assert torch.equal(grad.detach(), tensor(1)) and torch.equal(phi.detach(), tensor(0))


def test_adamw_adjoint_where_no_gradient_ever_was():
    """
    At epsilon_root = 0 the root has no derivative at 0. What is left is the direct path through the first moment, whose
    denominator is epsilon; elements with a gradient are as ever.
    """
    grad, rule = tensor(1), make_rule(weight_decay=0.0)
    zero = torch.arange(SIZE) < 3
    grad[zero] = 0.0
    of_phi = tensor(2)
    of_grad = rule.adjoint_(0, 0.1, tensor(0), zeros(rule), grad, of_phi, zeros(rule))
    torch.testing.assert_close(of_grad[zero], -0.1 / rule.epsilon * tensor(2)[zero], rtol=1e-10, atol=0)
    variable = grad.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        reference(rule, 0, 0.1, tensor(0), zeros(rule), variable)[0], variable, tensor(2)
    )
    torch.testing.assert_close(of_grad[~zero], expected[~zero], rtol=1e-6, atol=1e-9)
    later = rule.adjoint_(3, 0.1, tensor(0), zeros(rule), grad, of_phi, zeros(rule))
    assert later.isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_adamw_first_adjoint_does_not_cancel(scale):
    """Float32 against float64, also where the update is little else than the gradient's sign."""
    rule, found = make_rule(weight_decay=0.0, epsilon_root=1e-9), []
    for dtype in (torch.float32, torch.float64):
        grad, of_phi = (tensor(seed, dtype=torch.float32).to(dtype) for seed in (1, 2))
        nothing = tuple(torch.zeros_like(grad) for _ in range(2))
        found.append(rule.adjoint_(0, 0.1, grad, nothing, grad * scale, of_phi, nothing))
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-6, atol=0)


def one_step(max_norm, grad):
    """An optimizer that subtracts the clipped gradient, and its tape after a step."""
    block = Block(slice(0, SIZE), make_rule("sgd", weight_decay=0.0))
    optimizer = Optimizer([block], [1.0], max_norm, [grad.norm().item()])
    tape = Tape(optimizer, [block], 1, torch.Tensor.zero_, Storage())
    tape.push(StepInputs(torch.zeros_like(grad), (), grad))
    return optimizer, tape


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0], ids=["off", "active", "inactive"])
def test_clip_adjoint(max_norm):
    """Against autograd through the global norm."""
    grad, cotangent = tensor(0).requires_grad_(), tensor(1)
    clipped = grad * torch.clamp(max_norm / (grad.norm() + 1e-6), max=1.0) if max_norm else grad * 1.0
    (expected,) = torch.autograd.grad(clipped, grad, cotangent)
    grad, actual = grad.detach(), cotangent.clone()
    optimizer, tape = one_step(max_norm, grad)
    phi, (rule,) = torch.zeros_like(grad), [rule for _, rule in optimizer.group_blocks]
    optimizer.update_(0, rule, phi, (), grad)
    torch.testing.assert_close(-phi, clipped.detach())
    if optimizer.clip_factor(0) < 1:
        inner = optimizer.clipping_adjoint_(tape, actual, torch.dot(cotangent, grad).item())
        assert inner == pytest.approx(torch.dot(expected, grad).item())
    assert relative_error([actual], [expected]) < 1e-10
    assert (relative_error([actual], [cotangent]) > 0.1) == (max_norm == 0.5)


@pytest.mark.parametrize("max_norm", [1e-8, 1.0])
def test_clip_adjoint_of_a_zero_gradient(max_norm):
    """Around a gradient of zero clipping multiplies by min(1, M / 1e-6)."""
    actual = tensor(1)
    optimizer, tape = one_step(max_norm, torch.zeros_like(actual))
    optimizer.clipping_adjoint_(tape, actual, 0.0)
    assert relative_error([actual], [tensor(1) * min(1.0, max_norm / 1e-6)]) < 1e-12


# A whole run's update


def walk_back(optimizer, part, num_steps, total=float):
    """Trains on random gradients, and walks all steps back. Returns cotangents and inner products, the last step first."""
    blocks = optimizer.blocks(part.start, part.stop, torch.device("cpu"))
    phi = tensor(0)[part].clone()
    state = tuple(torch.zeros_like(phi) for _ in range(optimizer.num_states))
    tape = Tape(optimizer, blocks, num_steps, lambda out: out.copy_(tensor(0)[part]), Storage())
    for step in range(num_steps):
        grad = tensor(10 + step)[part].clone()
        tape.push(StepInputs(phi, state, grad))
        for block, rule in blocks:
            optimizer.update_(step, rule, phi[block], tuple(t[block] for t in state), grad[block])
    cotangent, found = Cotangent(tensor(1)[part].clone(), tape), []
    for _ in range(num_steps):
        along = torch.empty_like(phi)
        inner = total(optimizer.adjoint_(tape, phi, cotangent, along))
        if optimizer.clip_factor(tape.current) < 1:
            inner = total(optimizer.clipping_adjoint_(tape, along, inner))
        tape.pop()
        found.append((along.clone(), cotangent.phi.clone(), phi.clone(), inner))
    return found


def make_optimizer(name, max_grad_norm, num_steps=3):
    rules = [make_rule(name, weight_decay, epsilon_root=1e-3) for weight_decay in (0.3, 0.0)]
    rates = [0.1 / (step + 1) for step in range(num_steps)]
    parts = [Block(slice(0, 6), rules[0]), Block(slice(6, SIZE), rules[1])]
    return Optimizer(parts, rates, max_grad_norm, [tensor(10 + step).norm().item() for step in range(num_steps)])


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 100.0], ids=["off", "active", "inactive"])
@pytest.mark.parametrize("name", [name for name in RULES if "muon" not in name])
def test_walking_back_is_autograd(name, max_grad_norm):
    """Three steps, of which one half decays: every gradient's cotangent, and that of the parameters before each step."""
    optimizer = make_optimizer(name, max_grad_norm)
    grads = [tensor(10 + step).requires_grad_() for step in range(3)]
    before, halves = [], []
    phi = tensor(0).requires_grad_()
    state = [torch.zeros(SIZE, dtype=torch.float64) for _ in range(optimizer.num_states)]
    for step, grad in enumerate(grads):
        before.append(phi)
        clipped = grad * torch.clamp(max_grad_norm / (grad.norm() + 1e-6), max=1.0) if max_grad_norm else grad
        halves = [
            reference(rule, step, optimizer.rates[step], phi[part], [t[part] for t in state], clipped[part])
            for part, rule in optimizer.group_blocks
        ]
        phi, *state = (torch.cat(pair) for pair in zip(*halves, strict=True))
    expected = torch.autograd.grad(phi, [*grads, *before], tensor(1))
    for step, (along, of_phi, values, inner) in zip((2, 1, 0), walk_back(optimizer, slice(0, SIZE), 3), strict=True):
        assert relative_error([along, of_phi], [expected[step], expected[3 + step]]) < 1e-6
        assert inner == pytest.approx(torch.dot(expected[step], grads[step]).item(), rel=1e-6)
        torch.testing.assert_close(values, before[step].detach())


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("name", [name for name in RULES if "muon" not in name])
def test_shards(name, max_grad_norm):
    """Updates and adjoints of two parts are those of the whole, where each is told the sums over both."""
    totals: list[float] = []
    whole = walk_back(make_optimizer(name, max_grad_norm), slice(0, SIZE), 3, lambda x: totals.append(x) or x)
    parts, owns = [], []
    for bounds in ((0, 4), (4, SIZE)):
        known, own = iter(totals), []
        parts.append(
            walk_back(
                make_optimizer(name, max_grad_norm),
                slice(*bounds),
                3,
                lambda x, known=known, own=own: own.append(x) or next(known),
            )
        )
        owns.append(own)
    assert [a + b for a, b in zip(*owns, strict=True)] == pytest.approx(totals)
    for expected, *halves in zip(whole, *parts, strict=True):
        for i in range(3):
            torch.testing.assert_close(torch.cat([half[i] for half in halves]), expected[i], rtol=1e-9, atol=1e-12)
