"""Updates against `torch.optim`, adjoints against autograd."""

import math

import pytest
import torch

from trl_dpg.metagradients.flat import ALIGNMENT
from trl_dpg.metagradients.optimizers import (
    Hyperparameters,
    Moments,
    Optimizer,
    adamw_adjoint_,
    adamw_first_adjoint_,
    adamw_update_,
    clip_adjoint_,
    sgd_adjoint_,
    sgd_update_,
)


SHAPES = [(3, 4), (5,), (2, 1, 2)]
SIZE, DECAYED = 11, 6  # of flat tensors
BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8


def tensors(seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def flat_tensor(seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(SIZE, generator=generator, dtype=dtype)


def hyperparameters(step, learning_rate=0.1, weight_decay=0.3, epsilon=EPSILON, epsilon_root=0.0):
    return Hyperparameters(step, learning_rate, weight_decay, BETA1, BETA2, epsilon, epsilon_root)


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def reference_adamw(param, first, second, grad, hp):
    """
    One out-of-place step, written from the formula, which autograd can differentiate: with `epsilon_root` under the root. The
    second moment has it in it on the way in and out, as ours has.
    """
    second = second - (1 - hp.beta2 ** (hp.step - 1)) * hp.epsilon_root
    first = hp.beta1 * first + (1 - hp.beta1) * grad
    second = hp.beta2 * second + (1 - hp.beta2) * grad**2
    corrected_first = first / (1 - hp.beta1**hp.step)
    corrected_second = second / (1 - hp.beta2**hp.step)
    direction = corrected_first / (torch.sqrt(corrected_second + hp.epsilon_root) + hp.epsilon)
    updated = param - hp.learning_rate * (direction + hp.weight_decay * param)
    return updated, first, second + (1 - hp.beta2**hp.step) * hp.epsilon_root


def reference_sgd(param, grad, hp):
    return param - hp.learning_rate * (grad + hp.weight_decay * param)


def reference_clip(grads, max_norm):
    if max_norm == 0:
        return grads
    norm = torch.cat([g.flatten() for g in grads]).norm()
    return [g * torch.clamp(max_norm / (norm + 1e-6), max=1.0) for g in grads]


@pytest.mark.parametrize("optim, fused", [("adamw", False), ("adamw", True), ("sgd", False)])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_update_is_that_of_torch(optim, fused, max_grad_norm):
    """
    Five steps at changing learning rates, some elements without weight decay, gradients of changing scale; to the last bit by
    the same kernel.
    """
    rates = [0.01, 0.1, 0.1, 0.05, 0.02]
    values = flat_tensor(0)
    theirs = [torch.nn.Parameter(part.clone()) for part in values.split([DECAYED, SIZE - DECAYED])]
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(theirs, [0.3, 0.0], strict=True)]
    if optim == "adamw":
        stock = torch.optim.AdamW(groups, lr=1.0, betas=(BETA1, BETA2), eps=EPSILON, fused=fused)
    else:
        stock = torch.optim.SGD(groups, lr=1.0)
    table = [hyperparameters(step + 1, lr) for step, lr in enumerate(rates)]
    ours = Optimizer(optim, table, DECAYED, max_grad_norm)
    moments = ours.initial_moments(values)
    for step, lr in enumerate(rates):
        grad = flat_tensor(step + 1, scale=10.0 ** (step - 3))
        for param, part in zip(theirs, grad.split([DECAYED, SIZE - DECAYED]), strict=True):
            param.grad = part.clone()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        for group in stock.param_groups:
            group["lr"] = lr
        stock.step()
        ours.measure(grad)
        ours.update_(step, values, moments, grad)
        expected = torch.cat([p.detach() for p in theirs])
        assert relative_error([values], [expected]) < 1e-12
        assert not fused or max_grad_norm or torch.equal(values, expected)


def test_adamw_update_whatever_the_default_dtype():
    """A step above 256 is not a bfloat16."""
    hp, found = hyperparameters(302), []
    for dtype in (torch.float32, torch.bfloat16):
        param, grad = (flat_tensor(seed, dtype=torch.float32) for seed in (0, 1))
        moments = Moments(grad.clone(), grad**2)
        torch.set_default_dtype(dtype)
        try:
            adamw_update_(param, grad, moments, hp._replace(beta2=0.999))
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(param)
    assert torch.equal(*found)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_update_of_parts(dtype, num_threads):
    """To the last bit that of the whole, whatever the number of threads: parts as `FlatParameters` cuts them."""
    whole = [t.abs() for t in torch.randn(4, 64 * 512, generator=torch.Generator().manual_seed(0), dtype=dtype)]
    parts = [t.clone() for t in whole]
    hp = hyperparameters(3, epsilon_root=1e-3)
    before = torch.get_num_threads()
    adamw_update_(*whole[:2], Moments(*whole[2:]), hp)
    torch.set_num_threads(num_threads)
    try:
        for cut in zip(*(t.split(ALIGNMENT * 37) for t in parts), strict=True):
            adamw_update_(*cut[:2], Moments(*cut[2:]), hp)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, parts, whole))


@pytest.mark.parametrize("beta2", [0.0, BETA2])
@pytest.mark.parametrize("epsilon_root", [1e-9, 1e-4, 1.0])
def test_adamw_update_with_epsilon_root(epsilon_root, beta2):
    """Against the formula, where the root matters: gradients around its square root."""
    (param, *_), (first, *_), (second, *_) = tensors(0), tensors(1, 0.0), tensors(2, 0.0)
    ours, moments = param.clone(), Moments(first.clone(), second.clone())
    for step in range(1, 6):
        grad = tensors(step + 2, scale=math.sqrt(epsilon_root))[0]
        hp = hyperparameters(step, epsilon_root=epsilon_root)._replace(beta2=beta2)
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
    expected = torch.autograd.grad(updated, [grad, param], cotangent)
    assert relative_error([sgd_adjoint_(cotangent, hp), cotangent], expected) < 1e-12


@pytest.mark.parametrize("epsilon_root", [0.0, 1e-9, 1e-2])
@pytest.mark.parametrize("step", [1, 7])
def test_adamw_adjoint(step, epsilon_root):
    """All four cotangents against autograd through the formula, from nonzero moments and moment cotangents."""
    param, grad, first = (tensors(seed)[0].requires_grad_() for seed in (0, 1, 2))
    second = (tensors(3)[0] ** 2 + epsilon_root).requires_grad_()
    cotangents = [tensors(seed)[0] for seed in (4, 5, 6)]
    hp = hyperparameters(step, epsilon_root=epsilon_root)
    outputs = reference_adamw(param, first, second, grad, hp)
    expected = torch.autograd.grad(outputs, [grad, param, first, second], cotangents)
    moments = Moments(first.detach().clone(), second.detach().clone())
    out, *scratch = (torch.full_like(param, torch.nan) for _ in range(3))
    of_grad = adamw_adjoint_(cotangents[0], Moments(*cotangents[1:]), grad.detach(), moments, hp, out, scratch)
    assert relative_error([of_grad, *cotangents], expected) < 1e-10
    assert relative_error(moments, outputs[1:]) < 1e-12


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
    moments, given = Moments(torch.zeros_like(grad), torch.zeros_like(grad)), cotangent.clone()
    moment_cotangents = Moments(torch.zeros_like(grad), torch.zeros_like(grad))
    out, *scratch = (torch.full_like(param, torch.nan) for _ in range(3))
    of_grad = adamw_adjoint_(cotangent, moment_cotangents, grad, moments, hp, out, scratch).clone()
    assert all(torch.isfinite(t).all() for t in (of_grad, cotangent, *moment_cotangents))
    torch.testing.assert_close(of_grad[zero], -hp.learning_rate / hp.epsilon * given[zero], rtol=1e-10, atol=0)
    first = adamw_first_adjoint_(given.clone(), None, grad, hp, *scratch)
    torch.testing.assert_close(first, of_grad, rtol=1e-6, atol=1e-9)
    cotangent = given

    variable = grad.clone().requires_grad_()
    updated = reference_adamw(param, *nothing, variable, hp)[0]
    (expected,) = torch.autograd.grad(updated, variable, cotangent)
    torch.testing.assert_close(of_grad[~zero], expected[~zero], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("epsilon_root", [0.0, 1e-9, 1e-2])
@pytest.mark.parametrize("alone", [True, False], ids=["only step", "more steps"])
def test_adamw_first_adjoint(alone, epsilon_root):
    """Against autograd through the formula, from moments of zero."""
    param, grad = (tensors(seed)[0].requires_grad_() for seed in (0, 1))
    cotangents = [tensors(seed)[0] for seed in (4, 5, 6)]
    hp = hyperparameters(1, epsilon_root=epsilon_root)
    outputs = reference_adamw(param, torch.zeros_like(param), torch.zeros_like(param), grad, hp)
    count = 1 if alone else 3
    expected = torch.autograd.grad(outputs[:count], [grad, param], cotangents[:count])
    buffers = [torch.full_like(param, torch.nan) for _ in range(2)]
    moment_cotangents = None if alone else Moments(*cotangents[1:])
    of_grad = adamw_first_adjoint_(cotangents[0], moment_cotangents, grad.detach(), hp, *buffers)
    # Autograd subtracts terms that agree in up to 10 of 16 digits.
    assert relative_error([of_grad, cotangents[0]], expected) < 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_adamw_first_adjoint_does_not_cancel(scale):
    """Float32 against float64, also where the update is little else than the gradient's sign."""
    hp = hyperparameters(1, epsilon=1e-8, epsilon_root=1e-9)
    found = []
    for dtype in (torch.float32, torch.float64):
        grad, cotangent = (flat_tensor(seed, dtype=torch.float32).to(dtype) for seed in (1, 2))
        out, scratch = torch.empty_like(grad), torch.empty_like(grad)
        found.append(adamw_first_adjoint_(cotangent, None, grad * scale, hp, out, scratch))
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0], ids=["off", "active", "inactive"])
def test_clip_adjoint(max_norm):
    """Against autograd through the global norm."""
    grad, cotangent = flat_tensor(0).requires_grad_(), flat_tensor(1)
    (expected,) = torch.autograd.grad(reference_clip([grad], max_norm), grad, cotangent)
    actual, grad = cotangent.clone(), grad.detach()
    clip_adjoint_(actual, grad, torch.dot(cotangent, grad).item(), grad.norm().item(), max_norm)
    assert relative_error([actual], [expected]) < 1e-10
    assert (relative_error([actual], [cotangent]) > 0.1) == (max_norm == 0.5)


@pytest.mark.parametrize("max_norm", [1e-8, 1.0])
def test_clip_adjoint_of_a_zero_gradient(max_norm):
    """Around a gradient of zero clipping multiplies by min(1, M / 1e-6)."""
    cotangent = flat_tensor(1)
    actual = cotangent.clone()
    clip_adjoint_(actual, torch.zeros(SIZE), 0.0, 0.0, max_norm)
    assert relative_error([actual], [cotangent * min(1.0, max_norm / 1e-6)]) < 1e-12


@pytest.fixture(params=[None, 3], ids=["whole", "blocks of 3"])
def block(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(Optimizer, "BLOCK", {"cpu": request.param})


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 100.0], ids=["off", "active", "inactive"])
@pytest.mark.parametrize(
    ("optim", "last", "place"),
    [
        *((optim, last, "apart") for optim in ("adamw", "sgd") for last in (0, 2)),
        *((optim, 0, "cotangent") for optim in ("adamw", "sgd")),
        ("adamw", 2, "second moment"),
    ],
)
def test_optimizer_adjoint(last, place, optim, max_grad_norm, block):
    """
    The adjoint of a whole step, the first or the third, against autograd: every input from every output, wherever the result
    goes.
    """
    table = [hyperparameters(step, 0.1 / step, 0.3, epsilon_root=1e-3) for step in (1, 2, 3)]
    decay = 0.3 * (torch.arange(SIZE) < DECAYED).double()
    optimizer = Optimizer(optim, table, DECAYED, max_grad_norm)
    values, moments = flat_tensor(0), optimizer.initial_moments(flat_tensor(0))
    for step in range(last):
        optimizer.measure(flat_tensor(10 + step))
        optimizer.update_(step, values, moments, flat_tensor(10 + step))
    values, grad = values.requires_grad_(), flat_tensor(12).requires_grad_()
    cotangents = [flat_tensor(seed) for seed in (20, 21, 22)]
    (clipped,) = reference_clip([grad], max_grad_norm)
    hp = table[last]._replace(weight_decay=decay)
    if optim == "sgd":
        outputs, inputs, cotangents = [reference_sgd(values, clipped, hp)], [grad, values], cotangents[:1]
    else:
        inputs = [grad, values, *(m.requires_grad_() for m in moments)]
        outputs = reference_adamw(values, *moments, clipped, hp)
    expected = torch.autograd.grad(outputs, inputs, cotangents)

    grad = grad.detach()
    optimizer.measure(grad)
    moment_cotangents = Moments(*cotangents[1:]) if optim == "adamw" else None
    before = Moments(*(m.detach().clone() for m in moments)) if optim == "adamw" and last > 0 else None
    out = {"apart": torch.full_like(grad, torch.nan), "cotangent": cotangents[0]}.get(place, before and before.second)
    inner = optimizer.adjoint_(last, cotangents[0], moment_cotangents, grad, before, out)
    assert inner.item() == pytest.approx(torch.dot(out, grad).item(), rel=1e-10)
    if optimizer.clips(last):
        assert max_grad_norm == 0.5
        inner = optimizer.clip_adjoint_(last, out, grad, inner.item())
        assert inner.item() == pytest.approx(torch.dot(out, grad).item(), rel=1e-10)
    of_moments = moment_cotangents or () if last > 0 else ()  # nothing lies before the first step
    actual = [out, *([] if place == "cotangent" else [cotangents[0]]), *of_moments]
    assert relative_error(actual, expected[: len(actual)]) < 1e-10


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_shards(optim, max_grad_norm):
    """Updates and adjoints of two parts are those of the whole."""
    optimizer = Optimizer(optim, [hyperparameters(1, epsilon_root=1e-3)], DECAYED, max_grad_norm)
    optimizer.measure(flat_tensor(1))

    def step(optimizer, part, total=float):
        values, grad, cotangent = (flat_tensor(seed)[part].clone() for seed in (0, 1, 2))
        moments, moment_cotangents = (optimizer.initial_moments(values) for _ in range(2))
        optimizer.update_(0, values, moments, grad)
        of_grad = torch.empty_like(grad)
        inner = optimizer.adjoint_(0, cotangent, moment_cotangents, grad, None, of_grad).item()
        if optimizer.clips(0):
            inner = optimizer.clip_adjoint_(0, of_grad, grad, total(inner)).item()
        return [values, cotangent, of_grad, *(moments or ()), *(moment_cotangents or ())], inner

    inners = []
    whole, inner = step(optimizer, slice(None), lambda x: inners.append(x) or x)
    parts = [step(optimizer.shard(*bounds), slice(*bounds), lambda x: inners[0]) for bounds in ((0, 4), (4, SIZE))]
    joined = [torch.cat(pair) for pair in zip(*(tensors for tensors, _ in parts), strict=True)]
    for actual, expected in zip(joined, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert sum(inner for _, inner in parts) == pytest.approx(inner, rel=1e-10)
