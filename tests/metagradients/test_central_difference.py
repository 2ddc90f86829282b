"""Central differences against double backward: result, error estimate, and when it falls back."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.metagradients.cases import CASES, make_examples, metric, relative_error
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.method.central_difference import CentralDifference
from trl_dpg.metagradients.method.exact import Direction, Exact
from trl_dpg.metagradients.method.updates import SGD
from trl_dpg.metagradients.runtime.examples import MicroBatch
from trl_dpg.metagradients.runtime.processes import Processes
from trl_dpg.metagradients.runtime.workspace import Group, Workspace


CENTRAL = {"curvature": "central_difference"}


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


@pytest.mark.parametrize("name", CASES)
def test_float64(name):
    make_model, fields = CASES[name]
    model, examples = make_model(), make_examples()
    exact = compute_metagradients(model, examples, metric, TargetTrainingArguments(**fields))
    central = compute_metagradients(model, examples, metric, TargetTrainingArguments(**fields, **CENTRAL))
    assert relative_error(central.metagradients, exact.metagradients.double()) < 1e-6
    assert central.num_exact_fallbacks == 0
    assert len(central.curvature_errors) == len(central.losses) and max(central.curvature_errors) < 1e-6
    assert exact.curvature_errors == []


@pytest.mark.parametrize("epsilon_root", [1e-9, "auto"])
@pytest.mark.parametrize("num_steps", [1, 8])
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_float32(spread, num_steps, epsilon_root):
    """Against float64 double backward; the estimate is of the error's order or above it."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=spread, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    examples = [{"input_ids": torch.randint(64, (16,), generator=generator).tolist()} for _ in range(32)]
    fields = {"batch_size": 32 // num_steps, "learning_rate": 1e-4, "adam_epsilon_root": epsilon_root}
    model = GPT2LMHeadModel(config)
    central = compute_metagradients(model, examples, metric, TargetTrainingArguments(**fields, **CENTRAL))
    exact = compute_metagradients(model.double(), examples, metric, TargetTrainingArguments(**fields))
    error = relative_error(central.metagradients, exact.metagradients.double())
    assert cosine(central.metagradients, exact.metagradients) > 0.9999
    assert error < 10 * max(central.curvature_errors)


def test_a_step_that_is_too_rough_is_repeated_exactly():
    make_model, fields = CASES["adamw-k4"]
    exact = compute_metagradients(make_model(), make_examples(), metric, TargetTrainingArguments(**fields))
    args = TargetTrainingArguments(**fields, **CENTRAL, curvature_tolerance=0.0)
    out = compute_metagradients(make_model(), make_examples(), metric, args)
    assert out.num_exact_fallbacks == 4 and out.curvature_errors == [0.0] * 4
    assert relative_error(out.metagradients, exact.metagradients.double()) < 1e-6


def test_a_kink_is_noticed():
    """An activation that jumps has no derivative to be found: its steps fall back."""

    class Staircase(torch.nn.Module):
        def forward(self, x):
            return x + 0.5e-9 * torch.floor(x * 1e9)

    make_model, fields = CASES["adamw-k4"]
    model = make_model()
    model.transformer.h[0].mlp.act = Staircase()
    out = compute_metagradients(model, make_examples(), metric, TargetTrainingArguments(**fields, **CENTRAL))
    assert 0 < out.num_exact_fallbacks == out.curvature_errors.count(0.0)
    assert max(out.curvature_errors) <= TargetTrainingArguments.curvature_tolerance


def test_first_order_operations_only():
    """No double backward and no forward mode, and attention by a kernel that has neither."""
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    args = TargetTrainingArguments(batch_size=3, learning_rate=1e-4, adam_epsilon_root=1e-6, **CENTRAL)
    examples = [{"input_ids": [1 + i, 2, 3, 4 + i, 5, 6]} for i in range(6)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = compute_metagradients(model, examples, lambda m: -m.lm_head.weight.norm(), args)
    assert out.metagradients.all() and out.num_exact_fallbacks == 0


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_the_step_size_is_found_on_few_examples(spread):
    """Two passes over a batch of one step, beside the training pass, and at most two over an eighth of it."""
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=spread, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(1)
    examples = [{"input_ids": torch.randint(32, (10,), generator=generator).tolist()} for _ in range(32)]
    rows = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    args = TargetTrainingArguments(batch_size=32, learning_rate=1e-4, adam_epsilon_root="auto", **CENTRAL)
    out = compute_metagradients(model, examples, likelihood, args)
    assert out.num_exact_fallbacks == 0 and max(out.curvature_errors) < 5e-3
    rows = [count for count in rows if count > 2]  # what looks at the model takes fewer
    assert rows.count(32) == 3 and set(rows) == {32, 4} and rows.count(4) <= 2


@pytest.mark.parametrize("fields", [{}, {**CENTRAL, "curvature_tolerance": 0.0}], ids=["exact", "fallback"])
def test_exactly_on_a_compiled_model(fields):
    """Double backward runs what was compiled uncompiled."""
    make_model, recipe = CASES["adamw-k4"]
    expected = compute_metagradients(make_model(), make_examples(), metric, TargetTrainingArguments(**recipe))
    model = make_model()
    model.compile(backend="aot_eager", dynamic=True)
    out = compute_metagradients(model, make_examples(), metric, TargetTrainingArguments(**recipe, **fields))
    assert relative_error(out.metagradients, expected.metagradients.double()) < 1e-6


@pytest.mark.parametrize("way", ["gradient_checkpointing", "compile"])
def test_as_without(way):
    make_model, fields = CASES["adamw-k4"]
    expected = compute_metagradients(
        make_model(), make_examples(), metric, TargetTrainingArguments(**fields, **CENTRAL)
    )
    model = make_model()
    if way == "compile":
        model.compile(backend="aot_eager", dynamic=True)
    else:
        fields = {**fields, "gradient_checkpointing": True}
    out = compute_metagradients(model, make_examples(), metric, TargetTrainingArguments(**fields, **CENTRAL))
    assert relative_error(out.metagradients, expected.metagradients.double()) < 1e-5
    assert "forward" not in vars(model.transformer.h[0])


def test_nothing_to_differentiate_along():
    """At lambda = 0, here behind a learning rate schedule that ends at 0, metagradients are 0."""
    args = TargetTrainingArguments(
        batch_size=6, optim="sgd", lr_scheduler_type="constant_with_warmup", warmup_steps=1, **CENTRAL
    )
    make_model, _ = CASES["sgd-k1"]
    assert not compute_metagradients(make_model(), make_examples(), metric, args).metagradients.any()


def test_bf16_is_refused():
    with pytest.raises(ValueError, match="`bf16=True` and `curvature='central_difference'`"):
        TargetTrainingArguments(bf16=True, **CENTRAL)


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype)


def likelihood(model):
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    return -torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].double(), ids[0, 1:])


def token_row(model):
    """Depends on the embedding of a token that only the first batch has."""
    return model.transformer.wte.weight[31].double().sum()


def batches_of_two(last):
    generator = torch.Generator().manual_seed(1)
    examples = [{"input_ids": torch.randint(30, (10,), generator=generator).tolist()} for _ in range(6)]
    examples[0]["input_ids"][3] = 31
    return [*examples, *last]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("metric", "last"),
    [
        (likelihood, [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 2),
        (likelihood, [{"input_ids": [1, 2, 3], "weight": 0.0}] * 2),
        (token_row, [{"input_ids": [1, 2, 3]}] * 2),
    ],
    ids=["unsupervised", "zero-weights", "sparse-metric"],
)
def test_batches_without_an_effect(metric, last, optim):
    """Nothing moves along lambda in the batches treated first, which must not spoil the others."""
    args = TargetTrainingArguments(
        optim=optim, batch_size=2, shuffle=False, learning_rate=1e-3, adam_epsilon_root="auto"
    )
    exact = compute_metagradients(tiny(torch.float64), batches_of_two(last), metric, args)
    args = TargetTrainingArguments(**{**vars(args), **CENTRAL})
    central = compute_metagradients(tiny(), batches_of_two(last), metric, args)
    assert relative_error(central.metagradients, exact.metagradients.double()) < 2e-2
    assert len(central.curvature_errors) == 4


def test_parameters_of_zero():
    """A trained part that is all zeros gives no length to begin with."""
    model = tiny(torch.float64).requires_grad_(False)
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_()
    assert not model.transformer.h[0].mlp.c_fc.bias.any()
    args = TargetTrainingArguments(batch_size=6, learning_rate=1e-3, adam_epsilon_root="auto")
    exact = compute_metagradients(model, batches_of_two([]), likelihood, args)
    args = TargetTrainingArguments(**{**vars(args), **CENTRAL})
    central = compute_metagradients(model, batches_of_two([]), likelihood, args)
    assert relative_error(central.metagradients, exact.metagradients.double()) < 1e-2


def test_autocast_of_the_caller_plays_no_part():
    args = TargetTrainingArguments(batch_size=3, learning_rate=1e-3)
    expected = compute_metagradients(tiny(), batches_of_two([]), likelihood, args)
    with torch.autocast("cpu", torch.bfloat16):
        out = compute_metagradients(tiny(), batches_of_two([]), likelihood, args)
    assert torch.equal(out.metagradients, expected.metagradients)


class Curves(torch.nn.Module):
    """Losses of examples, by their indices, as functions of the first of 64 parameters."""

    def __init__(self, function):
        super().__init__()
        self.model, self.bf16 = torch.nn.Module(), False
        self.at = torch.nn.Parameter(torch.zeros(64))
        self.function, self.rows = function, []

    def forward(self, batch, candidates=False):
        self.rows.append(len(batch.indices))
        return self.function(torch.tensor(batch.indices), self.at[0])[:, None]


def differentiate(losses, num, distance=None):
    """Along the first parameter, at losses of 3 and slopes whose sum is 0."""
    direction = torch.zeros(64)
    direction[0] = 1.0
    ids, ones = torch.ones(num, 2, dtype=torch.long), torch.ones(num)
    batch = MicroBatch(
        list(range(num)), ids, ids, ids, ids[..., None][..., :0], ones, ones.long(), ones, 2 * torch.arange(num)
    )
    before = torch.full((num,), 3.0, dtype=torch.float64)
    with Workspace([Group(SGD, True, [losses.at])], Processes(None), may_split_tape=False) as space:
        central, product = CentralDifference(Exact(losses, space), tolerance=0.01), space.buffer()
        if distance is not None:
            central._length, central._farthest = distance, 1.0
        (found,) = central([batch], Direction(direction, 0.0, before), product)
    return central, found[:, 0], product


@pytest.mark.parametrize(("num", "passes"), [(32, [4] * 3 + [32] * 2), (4, [2] + [4] * 4)], ids=["few", "half"])
def test_a_curved_direction_is_seen_on_few_examples(num, passes):
    """
    Where losses change by what is looked for, they are too far from linear. No gradient of the batch is taken there, unless the
    few examples would be half of it.
    """
    losses = Curves(lambda i, x: 3 + (-1.0) ** i * x + 200 * x**2)
    central, found, product = differentiate(losses, num)
    assert losses.rows == passes and central.num_fallbacks == 0
    assert found == pytest.approx([(-1.0) ** i for i in range(num)], abs=1e-2)
    assert product[0].item() == pytest.approx(400 * num, rel=1e-2)


def test_one_example_far_from_linear():
    """Its third derivative shows in no second difference; the distance shrinks until the optimizer's adjoint agrees."""
    losses = Curves(lambda i, x: 3 + (-1.0) ** i * x + 600 * (i == 3) * x**3)
    central, found, product = differentiate(losses, 12, distance=0.1)  # right for all others
    assert central.num_fallbacks == 0 and central.errors[0] < 0.01
    assert found == pytest.approx([(-1.0) ** i for i in range(12)], abs=0.1)
    assert product.abs().max() < 1e-2
