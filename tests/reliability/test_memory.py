"""Memory that runs out, and memory that comes back."""

import gc
import logging
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trl_dpg import MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, check_metagradients, compute_metagradients
from trl_dpg.metagradients.method.updates import AdamW
from trl_dpg.metagradients.runtime.model import check_model
from trl_dpg.metagradients.runtime.workspace import Workspace
from trl_dpg.validation import validate


ROOT = Path(__file__).parents[2]
EXAMPLES = [{"input_ids": [1 + (i * j) % 16 for j in range(1, 4 + i % 5)]} for i in range(32)]
RECIPES = {
    "adamw": {"adam_epsilon_root": 1e-4},
    "sgd": {"optim": "sgd", "learning_rate": 0.05},
    "one-step": {"adam_epsilon_root": 1e-4, "batch_size": 32},
    "auto": {"adam_epsilon_root": "auto", "max_grad_norm": 0.1, "num_train_epochs": 2},
    "central": {"adam_epsilon_root": 1e-4, "curvature": "central_difference"},
    "exact after central": {
        "adam_epsilon_root": 1e-4,
        "curvature": "central_difference",
        "curvature_tolerance": 0.0,
    },
}
ERRORS = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "host": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    "python": lambda: MemoryError(),
    "c++": lambda: RuntimeError("std::bad_alloc"),
}


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


class Metric:
    """The norm of the head. Counts its calls: one before the forward sweep, one between the sweeps."""

    calls = 0

    def __call__(self, model):
        self.calls += 1
        return -(model.lm_head.weight.double() ** 2).sum()


def arguments(recipe, **fields):
    return TargetTrainingArguments(**{"learning_rate": 1e-3, "batch_size": 16, **RECIPES[recipe], **fields})


def limit(model, largest, applies=lambda: True, backwards=False, error="device"):
    """Has a model run out of memory on more than `largest` examples, forwards or behind its layer on the way back."""
    sizes = []

    def hook(module, args, output=None):
        hidden = args[0]
        if len(hidden) > largest and applies():
            sizes.append(len(hidden))
            if not backwards:
                raise ERRORS[error]()
            if output.requires_grad:
                output.register_hook(fail)

    def fail(grad):
        raise ERRORS[error]()

    block = model.transformer.h[0]
    block.register_forward_hook(hook) if backwards else block.register_forward_pre_hook(hook)
    return sizes


# The first step's adjoint is forward mode: it has no backward pass to fail in.
PLACES = [
    (recipe, sweep, backwards)
    for recipe in RECIPES
    for sweep in ("forward", "adjoint")
    for backwards in (False, True)
    if (recipe, sweep, backwards) != ("one-step", "adjoint", True)
]


@pytest.mark.parametrize("recipe, sweep, backwards", PLACES)
def test_smaller_micro_batches_give_the_same(recipe, sweep, backwards, caplog):
    model, metric = gpt2(), Metric()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = compute_metagradients(gpt2(), EXAMPLES, Metric(), arguments(recipe))
    limit(model, 4, lambda: metric.calls == (1 if sweep == "forward" else 2), backwards)
    with caplog.at_level(logging.WARNING):
        out = compute_metagradients(model, EXAMPLES, metric, arguments(recipe))
    assert out.micro_batch_size == 4 and whole.micro_batch_size is None
    expected = compute_metagradients(gpt2(), EXAMPLES, Metric(), arguments(recipe, micro_batch_size=4))
    if sweep == "forward":  # from the first batch on, and then it is that run to the last bit
        assert torch.equal(out.metagradients, expected.metagradients) and out.losses == expected.losses
    size = whole.metagradients.abs().max()
    tolerance = 1e-6 if recipe == "central" else 1e-7  # metagradients are rounded to float32
    for other in (whole, expected):
        assert (out.metagradients - other.metagradients).abs().max() <= tolerance * size
        assert out.losses == pytest.approx(other.losses, rel=1e-13)
    assert len(out.curvature_errors) == len(whole.curvature_errors)
    assert out.num_exact_fallbacks == whole.num_exact_fallbacks
    warned = [record.args[0] for record in caplog.records if "Memory ran out" in record.message]
    assert warned == ([16, 8, 4] if recipe == "one-step" else [8, 4])  # once per size
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["adamw", "sgd", "auto"])
def test_in_single_precision(recipe):
    """Rounding of float32: a few units in the seventh digit of the largest metagradient."""
    whole, halves = (
        compute_metagradients(gpt2(torch.float32), EXAMPLES, Metric(), arguments(recipe, micro_batch_size=size))
        for size in (None, 2)
    )
    difference = (whole.metagradients - halves.metagradients).abs().max() / whole.metagradients.abs().max()
    assert difference <= 5e-6


@pytest.mark.parametrize("error", ERRORS)
def test_what_counts_as_out_of_memory(error):
    model = gpt2()
    sizes = limit(model, 5, error=error)
    assert compute_metagradients(model, EXAMPLES, Metric(), arguments("adamw")).micro_batch_size == 4
    assert sizes == [16, 8]


def test_other_errors_are_no_reason_to_go_on():
    model, seen = gpt2(), []

    def fail(module, args):
        seen.append(len(args[0]))
        raise RuntimeError("CUDA error: device-side assert triggered")

    model.transformer.h[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        compute_metagradients(model, EXAMPLES, Metric(), arguments("one-step"))
    assert len(seen) == 1


def test_down_to_one_example(caplog):
    """Also where two are too many."""
    model = gpt2()
    check_model(model)
    limit(model, 1)
    out = compute_metagradients(model, EXAMPLES, Metric(), arguments("auto"))
    expected = compute_metagradients(gpt2(), EXAMPLES, Metric(), arguments("auto", micro_batch_size=1))
    assert out.micro_batch_size == 1 and torch.equal(out.metagradients, expected.metagradients)
    assert [r.args[0] for r in caplog.records if "Memory ran out" in r.message] == [8, 4, 2, 1]


@pytest.mark.parametrize("function", [compute_metagradients, validate])
def test_one_example_that_does_not_fit(function):
    model = gpt2()
    check_model(model)  # runs two at a time, once
    limit(model, 0)
    message = (
        "one example at a time.*lower `max_length`.*central_difference.*gradient_checkpointing.*adapters.*20.00 GiB"
    )
    with pytest.raises(MemoryError, match=message):
        function(model, EXAMPLES, Metric(), arguments("one-step"))


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("function", [compute_metagradients, validate])
def test_a_metric_that_runs_out_of_memory(function, call):
    """It has no micro-batches, so there is nothing to halve."""

    class Large(Metric):
        def __call__(self, model):
            value = super().__call__(model)
            if self.calls == call:
                raise ERRORS["device"]()
            return value

    metric = Large()
    with pytest.raises(MemoryError, match="`metric` ran out of memory.*fewer or shorter texts.*20.00 GiB"):
        function(gpt2(), EXAMPLES, metric, arguments("adamw"))
    assert metric.calls == call


@pytest.mark.parametrize(("owner", "name"), [(Workspace, "start_adjoint"), (AdamW, "update_"), (AdamW, "adjoint_")])
def test_memory_that_runs_out_beside_the_model(owner, name, monkeypatch):
    """Smaller micro-batches would not help there."""

    def fail(*args):
        raise ERRORS["device"]()

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(MemoryError, match="`micro_batch_size` does not help.*`tape=.*train adapters.*20.00 GiB"):
        compute_metagradients(gpt2(), EXAMPLES, Metric(), arguments("adamw"))


def test_validation_halves_too(caplog):
    model = gpt2()
    sizes = limit(model, 4, backwards=True)
    results = validate(model, EXAMPLES, Metric(), arguments("auto"))
    assert sizes[:2] == [16, 8] and set(sizes[2:]) <= {16, 8}
    assert results == validate(gpt2(), EXAMPLES, Metric(), arguments("auto", micro_batch_size=4))
    assert [r.args[0] for r in caplog.records if "Memory ran out" in r.message] == [8, 4]


def test_the_smaller_size_is_kept(tokenizer, causal_lm):
    """By the reward, for its next call, and in the logs; and by `check_metagradients` for all of its runs."""
    model, figures = causal_lm(), []
    reward = MetagradientReward(
        model, Metric(), TargetTrainingArguments(batch_size=8, adam_epsilon_root="auto"), tokenizer
    )
    completions = ["a b c d", "e f", "g h i", "j k l m n"] * 2
    batch = {"prompts": ["a"] * 8, "completions": completions, "completion_ids": [[5, 6, 2]] * 8}
    whole = reward(**batch, log_metric=lambda name, value: figures.append(name))
    assert "metagradient/micro_batch_size" not in figures
    sizes = limit(model, 3)
    for _ in range(3):
        figures = {}
        assert reward(**batch, log_metric=figures.__setitem__) == pytest.approx(whole, rel=1e-4, abs=1e-4)
        assert figures["metagradient/micro_batch_size"] == 2
    assert sizes == [8, 4] and reward.args.micro_batch_size == 2

    model = gpt2()
    sizes = limit(model, 4)
    args = arguments("auto", num_train_epochs=1)
    assert check_metagradients(model, EXAMPLES, Metric(), args, num_probes=1, num_reweightings=1).passed
    assert sizes == [16, 8]


def test_what_failed_is_freed_before_the_next_try():
    """Its activations are gone when the smaller batch starts, although the error that ended it saw them."""
    model, failed, alive = gpt2(), [], []

    def remember(module, args, output):
        alive.append(any(ref() is not None for ref in failed))
        if len(output) > 4:
            failed.append(weakref.ref(output.untyped_storage()))
            activations.append(weakref.ref(output))

    def fail(module, args, output):
        if len(args[0]) > 4:
            output.register_hook(lambda grad: (_ for _ in ()).throw(ERRORS["device"]()))

    activations = []
    gc.disable()
    try:
        model.transformer.h[0].ln_1.register_forward_hook(remember)
        model.transformer.h[0].register_forward_hook(fail)
        compute_metagradients(model, EXAMPLES, Metric(), arguments("one-step"))
    finally:
        gc.enable()
    assert len(activations) == 3 and not any(alive)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_AS, which only Linux enforces")
@pytest.mark.parametrize("curvature", ["exact", "central_difference"])
def test_real_memory_that_runs_out(curvature):
    """A process that may have so much memory and no more, in which a batch of 64 does not fit."""
    code = f"""
        import logging, resource, sys
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients

        logging.basicConfig()
        torch.set_num_threads(1)
        config = GPT2Config(vocab_size=2048, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        examples = [dict(input_ids=torch.randint(2048, (256,)).tolist()) for _ in range(64)]
        metric = lambda model: -model.transformer.wte.weight.double().square().sum()
        fields = dict(learning_rate=1e-3, adam_epsilon_root="auto", max_length=256, curvature={curvature!r})

        def run(count, size):
            args = TargetTrainingArguments(batch_size=64, micro_batch_size=size, **fields)
            return compute_metagradients(model, examples[:count], metric, args)

        run(2, 1)  # what is loaded at first use
        limit = int(sys.argv[1])
        if limit:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
        out = run(64, None if limit else 4)
        print(out.micro_batch_size, *out.metagradients.tolist())
    """

    def run(limit):
        command = [sys.executable, "-c", textwrap.dedent(code), str(limit)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]
        size, *metagradients = result.stdout.split()
        return int(size), torch.tensor([float(x) for x in metagradients]), result.stderr

    size, metagradients, log = run(320_000_000)  # a batch of 64 needs 400 and more
    assert size < 64 and "Memory ran out: from here on, 32 examples at a time" in log
    _, expected, _ = run(0)
    tolerance = 1e-4 if curvature == "exact" else 5e-3  # what central differences promise in float32
    assert (metagradients - expected).abs().max() <= tolerance * expected.abs().max()


# What comes back


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_200_calls_leave_nothing_behind(ends, tmp_path, tokenizer, causal_lm):
    """No tensor, no file, no thread, no open file, and the process's memory stops growing: at most 8 MB over 150 calls."""
    args = TargetTrainingArguments(batch_size=4, tape="disk", tape_dir=str(tmp_path))
    failing = []

    class Failing(Metric):
        def readouts(self, model):  # between the sweeps, with the tape on disk
            if failing:
                raise ArithmeticError("planted failure")
            return {}

    reward = MetagradientReward(causal_lm(), Failing(), args, tokenizer)
    batch = {"prompts": ["a"] * 8, "completions": ["a b c d", "e f", "g h i", "j"] * 2, "completion_ids": [[5, 2]] * 8}
    reward(**batch)
    if ends == "raises":
        failing.append(True)
    process = psutil.Process()

    def call():
        if ends == "returns":
            reward(**batch)
        else:
            with pytest.raises(ArithmeticError, match="planted"):
                reward(**batch)

    for _ in range(50):
        call()
    before = live_tensors(), process.num_fds(), process.num_threads()
    memory = process.memory_info().rss
    for _ in range(150):
        call()
    assert (live_tensors(), process.num_fds(), process.num_threads()) == before
    assert process.memory_info().rss - memory < 8_000_000
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calls_leave_nothing_on_the_device():
    model = gpt2().cuda()
    used = []
    for _ in range(20):
        compute_metagradients(model, EXAMPLES, Metric(), arguments("adamw"))
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[1:])) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_runs_out_of_memory():
    """A device of which the process may use a tenth of a gigabyte, in which a batch of 512 does not fit."""
    config = GPT2Config(
        vocab_size=2048, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).cuda()
    examples = [{"input_ids": torch.randint(2048, (256,)).tolist()} for _ in range(64)]
    fields = {"adam_epsilon_root": "auto", "batch_size": 64, "max_length": 256}
    expected = compute_metagradients(model, examples, Metric(), TargetTrainingArguments(**fields, micro_batch_size=4))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 4e8) / total)
    try:
        out = compute_metagradients(model, examples, Metric(), TargetTrainingArguments(**fields))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert out.micro_batch_size < 64
    difference = (out.metagradients - expected.metagradients).abs().max()
    assert difference <= 1e-4 * expected.metagradients.abs().max()
