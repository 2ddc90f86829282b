"""What a call leaves behind, what its result does not depend on, and `adam_epsilon_root`."""

import contextlib
import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, train_and_measure
from trl_dpg.metagradients.method.exact import Direction, Exact
from trl_dpg.metagradients.method.loss import TokenLosses, accumulate_gradient
from trl_dpg.metagradients.method.updates import AdamW
from trl_dpg.metagradients.runtime.examples import BUSY_TOKENS, micro_batches, prepare_examples
from trl_dpg.metagradients.runtime.model import check_model
from trl_dpg.metagradients.runtime.processes import Processes
from trl_dpg.metagradients.runtime.workspace import Group, Workspace
from trl_dpg.validation import validate


VOCAB = 17
ADAMW = {"learning_rate": 1e-2, "adam_epsilon_root": 1e-4, "weight_decay": 0.1}
RECIPES = {
    "adamw-k1": {**ADAMW, "batch_size": 6},
    "adamw-k4": {**ADAMW, "batch_size": 3, "num_train_epochs": 2},
    "sgd-k4": {"optim": "sgd", "learning_rate": 0.1, "batch_size": 3, "num_train_epochs": 2},
}


def gpt2(dtype=torch.float64, attention="sdpa"):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.1, attn_pdrop=0.1,
        tie_word_embeddings=False, initializer_range=0.3, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(dtype)
    check_model(model)  # runs it once
    return model


def make_examples(n=6):
    generator = torch.Generator().manual_seed(2)
    examples = []
    for i in range(n):
        ids = torch.randint(VOCAB, (4 + 2 * (i % 3),), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]] if i % 2 else ids})
    return examples


def metric(model):
    """Depends on the weights alone, so that every forward pass of the model is one of training."""
    return -sum((p.double() ** 2).sum() + (p.double() ** 3).sum() for p in model.parameters() if p.requires_grad)


def metagradients(model, examples, fields, **changes):
    return compute_metagradients(
        model, examples, metric, TargetTrainingArguments(**{**fields, **changes})
    ).metagradients


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# State


class Failure(Exception):
    pass


class FailingMetric:
    """Consumes random numbers in every phase, and raises in the one named."""

    def __init__(self, phase=None):
        self.phase, self.calls = phase, 0

    def enter(self, phase):
        torch.rand(3)
        if phase == self.phase:
            raise Failure(phase)

    def setup(self, model):
        self.enter("setup")

    def __call__(self, model):
        self.calls += 1
        self.enter("metric before" if self.calls == 1 else "metric after")
        return metric(model)

    def readouts(self, model):
        self.enter("readouts")
        return {"readout": 1.0}


def prepared_model():
    """Frozen and trained parameters, mixed modes, a gradient or none, a buffer that every forward pass changes."""
    model = gpt2(torch.float32)
    model.train()
    model.transformer.h[0].mlp.eval()
    model.lm_head.eval()
    model.transformer.wpe.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 0.7)
    model.transformer.wpe.weight.grad = torch.full_like(model.transformer.wpe.weight, 0.3)
    model.register_buffer("forwards", torch.zeros(()))
    return model


def snapshot(model):
    """Everything that a call must put back, in comparable form; identity of gradients is kept beside their values."""
    state = {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}
    state |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    state |= {f"grad {name}": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state |= {f"identity of grad {name}": id(p.grad) for name, p in model.named_parameters()}
    state |= {f"identity of {name}": id(p) for name, p in model.named_parameters()}
    state |= {f"requires_grad {name}": p.requires_grad for name, p in model.named_parameters()}
    state |= {f"training {name}": m.training for name, m in model.named_modules()}
    state |= {"random": torch.get_rng_state(), "attention": model.config._attn_implementation}
    return state


def assert_unchanged(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def train_forwards(model, fail_at=None):
    """Counts forward passes in the model's buffer, and raises in the one numbered `fail_at`, from 1."""
    calls = []

    def hook(module, args):
        calls.append(None)
        module.forwards += 1
        torch.rand(3)
        if len(calls) == fail_at:
            raise Failure("forward")

    model.register_forward_pre_hook(hook)
    return calls


def run(function, model, metric, fields):
    return function(model, make_examples(), metric, TargetTrainingArguments(**fields))


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("function", [compute_metagradients, validate])
def test_state_after_success(function, fields):
    """All state is back to the last bit, although training changed every kind of it on the way."""
    model, during = prepared_model(), {}

    def recording_metric(model):
        during.update(snapshot(model))
        with torch.enable_grad():
            metric(model).backward()  # a metric may, and what was in `.grad` survives it
        return metric(model)

    calls, before = train_forwards(model), snapshot(model)
    run(function, model, recording_metric, fields)
    assert len(calls) > 0 and not during["training lm_head"] and not during["training transformer"]
    for name, param in model.named_parameters():
        assert torch.equal(during[f"parameter {name}"], param) == (not param.requires_grad)
    assert not torch.equal(during["buffer forwards"], before["buffer forwards"])
    assert not torch.equal(during["random"], before["random"])
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("function", [compute_metagradients, train_and_measure])
@pytest.mark.parametrize("phase", ["setup", "before", "after"])
def test_state_after_a_metric_that_writes_to_weights(function, phase):
    """What it writes before the run plays no part in it, either."""
    model, calls = prepared_model(), []

    def writing(model):
        calls.append(None)
        if phase == ("before", "after")[len(calls) - 1]:
            model.lm_head.weight.data.mul_(2.0)
        return metric(model)

    def setup(model):
        if phase == "setup":
            model.lm_head.weight.data.mul_(2.0)

    writing.setup = setup
    before = snapshot(model)
    out = run(function, model, writing, RECIPES["adamw-k4"])
    assert_unchanged(before, snapshot(model))
    assert out.losses == run(function, model, metric, RECIPES["adamw-k4"]).losses


@pytest.mark.parametrize("phase", ["setup", "metric before", "metric after", "readouts"])
@pytest.mark.parametrize("function", [compute_metagradients, validate])
def test_state_after_a_failing_metric(function, phase):
    model = prepared_model()
    train_forwards(model)
    before = snapshot(model)
    with pytest.raises(Failure, match=phase):
        run(function, model, FailingMetric(phase), RECIPES["adamw-k4"])
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize(
    ("function", "fail_at"),
    [(compute_metagradients, n) for n in range(1, 9)] + [(validate, n) for n in range(1, 5)],
    ids=lambda value: value if isinstance(value, int) else value.__name__,
)
def test_state_after_a_failing_forward_pass(function, fail_at):
    """Any of the forward passes: K = 4 of training, 4 of the adjoint, the first step's last."""
    model = prepared_model()
    calls = train_forwards(model, fail_at)
    before = snapshot(model)
    with pytest.raises(Failure, match="forward"):
        run(function, model, metric, RECIPES["adamw-k4"])
    assert len(calls) == fail_at
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("function", [compute_metagradients, validate])
def test_state_after_a_bad_example(function):
    model, args = prepared_model(), TargetTrainingArguments()
    before = snapshot(model)
    with pytest.raises(ValueError, match="vocabulary"):
        function(model, [*make_examples(), {"input_ids": [1, VOCAB]}], metric, args)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_a_gradient_from_before_does_not_enter(fields):
    """With something in `.grad` the runs are the same to the last bit."""
    model = gpt2()
    engine, stock = (run(function, model, metric, fields) for function in (compute_metagradients, validate))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    assert torch.equal(run(compute_metagradients, model, metric, fields).metagradients, engine.metagradients)
    assert run(validate, model, metric, fields) == stock


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_called_without_gradients(fields):
    """Under `torch.no_grad()`, as in an evaluation loop, the runs are the same, and it is still on afterwards."""
    model = gpt2()
    engine, stock = (run(function, model, metric, fields) for function in (compute_metagradients, validate))
    with torch.no_grad():
        assert torch.equal(run(compute_metagradients, model, metric, fields).metagradients, engine.metagradients)
        assert run(validate, model, metric, fields) == stock
        assert not torch.is_grad_enabled()


# Attention


@pytest.fixture
def custom_attention():
    """SDPA under a name that the engine does not know, which it must replace while it differentiates twice."""
    used = []

    def attention(*args, **kwargs):
        used.append(None)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("custom", attention)
    AttentionMaskInterface.register("custom", sdpa_mask)
    yield used
    AttentionInterface._global_mapping.pop("custom")
    AttentionMaskInterface._global_mapping.pop("custom")


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_attention_implementations_agree(fields, custom_attention):
    results = {
        name: metagradients(gpt2(attention=name), make_examples(), fields) for name in ("eager", "sdpa", "custom")
    }
    assert relative_error(results["sdpa"], results["eager"]) < 1e-6
    assert relative_error(results["custom"], results["eager"]) < 1e-6
    # one layer: once when it is checked, and once in each training step; never in the adjoint
    steps = fields.get("num_train_epochs", 1) * 6 // fields["batch_size"]
    assert len(custom_attention) == steps + 1


@pytest.mark.parametrize("fail_at", [None, 3, 6, 8])
def test_attention_implementation_is_put_back(fail_at, custom_attention):
    model = prepared_model()
    model.set_attn_implementation("custom")
    train_forwards(model, fail_at)
    before = snapshot(model)
    assert before["attention"] == "custom"
    with pytest.raises(Failure) if fail_at else contextlib.nullcontext():
        run(compute_metagradients, model, metric, RECIPES["adamw-k4"])
    assert_unchanged(before, snapshot(model))


# What the result does not depend on


@pytest.mark.parametrize("loss_normalization", ["batch_tokens", "example", "max_length"])
@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_micro_batches(fields, loss_normalization):
    """The size of a forward pass changes no result, also where it does not divide the batch."""
    fields = {**fields, "loss_normalization": loss_normalization, "max_grad_norm": 0.5}
    model, sizes = gpt2(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    outputs = {}
    for size in (None, 1, 2, 4, 100):
        sizes.clear()
        args = TargetTrainingArguments(**fields, micro_batch_size=size)
        outputs[size] = compute_metagradients(model, make_examples(), metric, args)
        assert max(sizes) == min(size or 100, fields["batch_size"])
    expected = outputs.pop(None)
    for actual in outputs.values():
        assert actual.metric_after == pytest.approx(expected.metric_after, rel=1e-12)
        assert actual.losses == pytest.approx(expected.losses, rel=1e-12)
        assert relative_error(actual.metagradients, expected.metagradients) < 1e-7  # rounded to float32


@pytest.mark.parametrize("curvature", ["exact", "central_difference"])
def test_uneven_texts_are_put_together_by_length(curvature, monkeypatch):
    """Which saves padding, and changes no result."""
    monkeypatch.setitem(BUSY_TOKENS, "cpu", 16)
    model, examples = gpt2(), make_examples(24)
    recipe = TargetTrainingArguments(**ADAMW, batch_size=24, num_train_epochs=2, curvature=curvature)
    outputs = {}
    for fields in ({"micro_batch_size": 1}, {}, {"micro_batch_tokens": 20}):
        args, passes = replace(recipe, **fields), []
        hook = model.register_forward_pre_hook(
            lambda _, __, kwargs, passes=passes: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        validate(model, examples, metric, args)
        hook.remove()
        outputs[sum(passes), max(passes)] = compute_metagradients(model, examples, metric, args).metagradients
    whole, *others = outputs.values()
    (tokens, _), (by_length, _), (_, most) = outputs
    assert by_length <= 1.1 * tokens and most <= 20
    for other in others:
        assert relative_error(other, whole) < (1e-7 if curvature == "exact" else 1e-2)


@pytest.mark.parametrize("size", [1, 4])
def test_derivatives_over_micro_batches(size):
    """Gradient, Hessian-vector product and metagradients of a batch, before any rounding to float32."""
    model = gpt2().eval()
    losses, alone, examples = TokenLosses(model, False), Processes(None), prepare_examples(make_examples(), 16, VOCAB)
    results = []
    with Workspace([Group(AdamW, True, list(model.parameters()))], alone, may_split_tape=False) as space:
        for micro_batch_size in (None, size):
            args = TargetTrainingArguments()
            batches = micro_batches(examples, list(range(6)), args, micro_batch_size, space.phi, alone)
            values, grad, product = torch.zeros(6, dtype=torch.float64), space.buffer(), space.buffer()
            space.accumulate_into(grad)
            accumulate_gradient(losses, space, batches, values, lambda: None)
            vector = torch.ones_like(space.buffer())[: space.size]
            exact, direction = Exact(losses, space), Direction(vector, 0.0, values)
            double_backward = torch.cat(exact(batches, direction, product))
            forward_mode = torch.cat(exact(batches, direction, None))
            assert relative_error(forward_mode, double_backward) < 1e-12
            nowhere = Direction(torch.zeros_like(vector), 0.0, values)
            assert not any(
                rows.any() for rows in [*exact(batches, nowhere, space.buffer()), *exact(batches, nowhere, None)]
            )
            results.append(torch.cat([grad, product, double_backward[:, 0], values]))
    assert relative_error(results[1], results[0]) < 1e-12


def test_global_random_state_plays_no_part():
    """The shuffle has its own generator, and dropout is off."""
    results = []
    for seed in (0, 1):
        model = gpt2()
        torch.manual_seed(seed)
        model.train()
        results.append(metagradients(model, make_examples(), RECIPES["adamw-k4"], shuffle=True))
    assert torch.equal(*results)


def test_shuffling():
    """Every epoch is a new permutation, which the seed alone decides."""

    def order(**fields):
        torch.rand(1)
        return list(TargetTrainingArguments(batch_size=4, num_train_epochs=2, **fields).batches(10))

    assert order(seed=1) == order(seed=1) != order(seed=2)
    batches = order(seed=1)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    epochs = [sum(batches[:3], []), sum(batches[3:], [])]
    assert epochs[0] != epochs[1] and all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert order(shuffle=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2


@pytest.mark.parametrize("fields", [RECIPES["adamw-k1"], {**RECIPES["sgd-k4"], "batch_size": 6}], ids=["k1", "k2"])
def test_results_are_in_the_order_of_the_examples(fields):
    """One batch of all examples: permuting them permutes the metagradients."""
    examples, permutation = make_examples(), [3, 0, 5, 1, 4, 2]
    plain = metagradients(gpt2(), examples, fields, shuffle=False)
    permuted = metagradients(gpt2(), [examples[i] for i in permutation], fields, shuffle=False)
    assert relative_error(permuted, plain[permutation]) < 1e-6
    assert relative_error(permuted, plain) > 1e-2


def test_results_are_in_the_order_of_the_examples_when_shuffled():
    """A shuffled run is the unshuffled run of the shuffled examples, its results put back in order."""
    examples, fields = make_examples(), {**ADAMW, "batch_size": 2}
    order = sum(TargetTrainingArguments(**fields, seed=3).batches(6), [])
    assert order != sorted(order)
    shuffled = metagradients(gpt2(), examples, fields, seed=3)
    by_hand = metagradients(gpt2(), [examples[i] for i in order], fields, shuffle=False)
    assert torch.equal(shuffled[order], by_hand)


# Weights


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_zero_weight(fields):
    """
    An example of weight 0 does not act on the run, whatever its tokens are, yet has a metagradient: that of finite
    differences, and another one for other tokens.
    """
    examples = make_examples()
    examples[2]["weight"] = 0.0
    others = copy.deepcopy(examples)
    others[2]["input_ids"] = others[2]["labels"] = [(token + 1) % VOCAB for token in examples[2]["input_ids"]]
    args = TargetTrainingArguments(**fields)
    out, other = (compute_metagradients(gpt2(), e, metric, args) for e in (examples, others))
    assert out.metric_after == pytest.approx(other.metric_after, rel=1e-12)
    rest = [0, 1, 3, 4, 5]
    assert relative_error(out.metagradients[rest], other.metagradients[rest]) < 1e-6
    assert abs(out.metagradients[2] - other.metagradients[2]) > 1e-3 * abs(out.metagradients[2])
    values = []
    for weight in (-1e-4, 1e-4):
        examples[2]["weight"] = weight
        values.append(compute_metagradients(gpt2(), examples, metric, args).metric_after)
    assert out.metagradients[2].item() == pytest.approx((values[1] - values[0]) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_weights_in_validate(fields):
    """`validate` trains on the same weighted loss as the engine, where both use the same optimizer."""
    examples, args = make_examples(), TargetTrainingArguments(**{**fields, "adam_epsilon_root": 0.0})
    for i, example in enumerate(examples):
        example["weight"] = 0.2 * i
    with warnings.catch_warnings(action="ignore"):
        engine = compute_metagradients(gpt2(), examples, metric, args)
    stock = validate(gpt2(), examples, metric, args)
    unweighted = validate(gpt2(), make_examples(), metric, args)
    assert stock["metric_gain"] == pytest.approx(engine.metric_after - engine.metric_before, rel=1e-6)
    assert unweighted["metric_gain"] != pytest.approx(stock["metric_gain"], rel=1e-2)


# adam_epsilon_root


def test_auto_epsilon_root():
    """Four times the mean square of the first batch's gradient, and the same metagradients as with that number."""
    model, examples = gpt2(), make_examples()
    fields = {**RECIPES["adamw-k4"], "adam_epsilon_root": "auto", "shuffle": False}
    out = compute_metagradients(model, examples, metric, TargetTrainingArguments(**fields))

    model.eval()
    total, tokens = 0.0, 0
    for example in examples[:3]:
        labels = torch.tensor(example["labels"][1:])
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels, reduction="sum")
        tokens += (labels != -100).sum()
    grads = torch.autograd.grad(total / tokens, list(model.parameters()))
    flat = torch.cat([g.flatten() for g in grads])
    assert out.adam_epsilon_root == pytest.approx(4 * flat.square().mean().item(), rel=1e-10)

    number = metagradients(model, examples, fields, adam_epsilon_root=out.adam_epsilon_root)
    assert torch.equal(out.metagradients, number)


def test_auto_is_the_default_epsilon_root():
    """Whether arguments are given or not; the recipe that has no use for it does not need a gradient to measure."""
    expected = compute_metagradients(
        gpt2(), make_examples(), metric, TargetTrainingArguments(adam_epsilon_root="auto")
    )
    for args in (None, TargetTrainingArguments()):
        out = compute_metagradients(gpt2(), make_examples(), metric, args)
        assert out.adam_epsilon_root == expected.adam_epsilon_root
    out = compute_metagradients(gpt2(), [{"input_ids": [1]}], metric, TargetTrainingArguments(optim="sgd"))
    assert out.metagradients.tolist() == [0.0]


def test_number_as_epsilon_root_is_returned():
    args = TargetTrainingArguments(adam_epsilon_root=3e-7)
    assert compute_metagradients(gpt2(), make_examples(), metric, args).adam_epsilon_root == 3e-7


def test_warns_of_ill_conditioned_metagradients():
    """AdamW without `adam_epsilon_root` warns, and says why; it is usable all the same."""
    args = TargetTrainingArguments(adam_epsilon_root=0.0)
    with pytest.warns(UserWarning, match=r"`adam_epsilon_root` is 0.*ill-conditioned.*1e-9") as caught:
        out = compute_metagradients(gpt2(), make_examples(), metric, args)
    assert caught[0].filename == __file__
    assert torch.isfinite(out.metagradients).all() and out.metagradients.any()


@pytest.mark.parametrize(
    "fields",
    [{"optim": "sgd", "adam_epsilon_root": 0.0}, {"adam_epsilon_root": 1e-12}, {"adam_epsilon_root": "auto"}],
    ids=["sgd", "number", "auto"],
)
def test_does_not_warn(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = TargetTrainingArguments(**fields)
        compute_metagradients(gpt2(), make_examples(), metric, args)
    TargetTrainingArguments(adam_epsilon_root=0.0)


def test_a_buffer_that_the_model_replaces_is_put_back():
    model = gpt2()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: setattr(module, "calls", module.calls + 1))
    buffer = model.calls
    compute_metagradients(model, make_examples(), metric, TargetTrainingArguments(batch_size=3))
    assert model.calls is buffer and buffer == 0
