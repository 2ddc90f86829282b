"""The tape against naively stored states, its size, and what is left of it."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, memory
from trl_dpg.metagradients.flat import FlatParameters
from trl_dpg.metagradients.objective import ExampleLosses
from trl_dpg.metagradients.optimizers import Hyperparameters, Moments, Optimizer
from trl_dpg.metagradients.storage import DeviceStorage, HostStorage, open_storage
from trl_dpg.metagradients.trajectory import Tape, tape_tensors


SIZE = 7
CPU = torch.device("cpu")


def make_optimizer(optim, num_steps):
    table = [Hyperparameters(k + 1, 0.1 / (k + 1), 0.1, 0.9, 0.95, 1e-8, 1e-6) for k in range(num_steps)]
    return Optimizer(optim, table, num_decayed=4, max_grad_norm=2.0)


def load_originals(values):
    torch.arange(float(SIZE), out=values)


def record(tape, optimizer, num_steps, device=CPU):
    """Records a run on random gradients; returns every step's state and gradient, copied on the way."""
    generator = torch.Generator().manual_seed(0)
    values = torch.arange(float(SIZE), device=device)
    moments = optimizer.initial_moments(values)
    naive = []
    for step in range(num_steps):
        grad = torch.randn(SIZE, generator=generator).to(device)
        state = [values, *(moments or ())]
        naive.append([t.clone() for t in (*state, grad)])
        optimizer.measure(grad)
        tape.record(state, grad.clone())
        optimizer.update_(step, values, moments, grad)
    return naive


@pytest.mark.parametrize("location", ["device", "host", "disk"])
@pytest.mark.parametrize("num_steps", [*range(1, 11), 31, 64, 96])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_replays_to_the_last_bit(optim, num_steps, location, tmp_path):
    check_replays(optim, num_steps, location, CPU, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("location", ["device", "host", "disk"])
def test_replays_to_the_last_bit_on_a_gpu(location, tmp_path, monkeypatch):
    monkeypatch.setattr(HostStorage, "BLOCK", 4)
    check_replays("adamw", 31, location, torch.device("cuda"), tmp_path)


def check_replays(optim, num_steps, location, device, tmp_path):
    """States and gradients of every step, walked backwards and written to, equal those copied on the way; so does what was
    set aside."""
    optimizer, storage = make_optimizer(optim, num_steps), open_storage(location, str(tmp_path), device)
    tape = Tape(optimizer, num_steps, load_originals, storage)
    expected_aside = []
    for step, expected in reversed(list(enumerate(record(tape, optimizer, num_steps, device)))):
        values = torch.full((SIZE,), torch.nan, device=device)
        moments, grad, aside = tape.rewind(values)
        actual = [values, *(moments or optimizer.initial_moments(values) or ()), grad]
        assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))
        assert len(aside or ()) == len(expected_aside) and all(map(torch.equal, aside or (), expected_aside))
        for tensor in (*actual, *(aside or ())):  # they are the caller's
            tensor.fill_(torch.nan)
        pair = [torch.full((SIZE,), 2.0 * step + i, device=device) for i in range(2)]
        expected_aside = pair if step % 3 > 0 else []
        if expected_aside:
            tape.set_aside(Moments(*(t.clone() for t in expected_aside)))
    storage.close()


class CountingStorage(DeviceStorage):
    def __init__(self):
        self.count = self.peak = 0

    def put(self, tensor):
        self.count += 1
        self.peak = max(self.peak, self.count)
        return super().put(tensor)

    def drop(self, key):
        self.count -= 1


@pytest.mark.parametrize("num_steps", [1, 2, 8, 30, 32, 96, 200])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_size_and_cost(optim, num_steps, monkeypatch):
    """At most 1.1 tensors a step, replays included, and replays that grow like a logarithm where there is room."""
    optimizer, storage = make_optimizer(optim, num_steps), CountingStorage()
    tape = Tape(optimizer, num_steps, load_originals, storage)
    record(tape, optimizer, num_steps)
    updates = []
    update = optimizer.update_
    monkeypatch.setattr(optimizer, "update_", lambda *args: updates.append(1) or update(*args))
    for _ in range(num_steps):
        tape.rewind(torch.empty(SIZE))
    assert storage.count == 0
    assert num_steps <= storage.peak <= tape_tensors(num_steps, optim) <= 1.1 * num_steps
    assert len(updates) <= 5 * num_steps


def model(n_layer=1):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=n_layer, n_head=1, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


EXAMPLES = [{"input_ids": [1 + i % 9, 2, 3, 4 + i % 5]} for i in range(8)]


def metric(model):
    return -model.lm_head.weight.norm()


@pytest.mark.parametrize("tape", ["device", "host", "disk"])
def test_location_changes_no_bit(tape, tmp_path):
    args = {"batch_size": 2, "num_train_epochs": 3, "learning_rate": 1e-3}
    expected = compute_metagradients(model(), EXAMPLES, metric, TargetTrainingArguments(**args))
    args = TargetTrainingArguments(**args, tape=tape, tape_dir=str(tmp_path))
    out = compute_metagradients(model(), EXAMPLES, metric, args)
    assert torch.equal(out.metagradients, expected.metagradients)
    assert out.plan.tape == tape and os.listdir(tmp_path) == []


def test_the_file_has_no_name(tmp_path):
    storage = open_storage("disk", str(tmp_path), CPU)
    keys = [storage.put(torch.full((3,), float(i))) for i in range(3)]
    assert [storage.get(key).tolist() for key in keys] == [[i] * 3 for i in range(3)]
    assert os.fstat(storage.file.fileno()).st_size == 36 and os.listdir(tmp_path) == []
    storage.close()


def test_a_killed_process_leaves_nothing(tmp_path):
    """Killed in the middle of a run, with the tape on disk."""
    code = f"""
        import time, torch
        from tests.metagradients.test_tape import EXAMPLES, model
        from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
        class Metric:
            def __call__(self, model): return -model.lm_head.weight.norm()
            def readouts(self, model):  # between the sweeps
                print("recorded", flush=True); time.sleep(600)
        args = TargetTrainingArguments(batch_size=2, tape="disk", tape_dir={str(tmp_path)!r})
        compute_metagradients(model(), EXAMPLES, Metric(), args)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "recorded\n"
        open_files = os.listdir(f"/proc/{process.pid}/fd") if os.path.exists("/proc") else []
        links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in open_files]
        assert not open_files or any(str(tmp_path) in link for link in links)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert os.listdir(tmp_path) == []


# Prediction


def test_auto_takes_what_has_room(monkeypatch, tmp_path):
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20, tape_dir=str(tmp_path))
    out = compute_metagradients(model(), EXAMPLES, metric, args)
    assert out.plan.tape == "device"
    assert out.plan.tape_bytes >= 160 * 4 * sum(p.numel() for p in model().parameters())
    room = out.plan.peak_bytes - out.plan.tape_bytes // 2
    monkeypatch.setattr(memory, "_free_memory", lambda device: room)
    assert compute_metagradients(model(), EXAMPLES, metric, args).plan.tape == "disk"


@pytest.mark.parametrize("tape", ["auto", "device", "disk"])
def test_too_little_room_is_an_error_before_the_first_step(tape, monkeypatch, tmp_path):
    target = model()
    args = TargetTrainingArguments(batch_size=4, num_train_epochs=20, tape=tape, tape_dir=str(tmp_path))
    plan = compute_metagradients(target, EXAMPLES, metric, replace(args, tape="disk")).plan
    calls = []
    target.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    without = plan.peak_bytes - int(memory.ACTIVATIONS["exact"] * plan.activation_bytes)
    monkeypatch.setattr(memory, "_free_memory", lambda device: without)
    with pytest.raises(MemoryError, match=r"needs .* MB .*central_difference.*adapters"):
        compute_metagradients(target, EXAMPLES, metric, args)
    assert len(calls) == 4  # the passes that measure: gradients, and second derivatives


def test_too_little_room_for_the_batch_takes_smaller_micro_batches(monkeypatch):
    args = TargetTrainingArguments(batch_size=4, num_train_epochs=2, tape="disk")
    plan = compute_metagradients(model(), EXAMPLES, metric, args).plan
    expected = compute_metagradients(model(), EXAMPLES, metric, replace(args, micro_batch_size=2))
    room = plan.peak_bytes - plan.activation_bytes // 2
    monkeypatch.setattr(memory, "_free_memory", lambda device: room)
    out = compute_metagradients(model(), EXAMPLES, metric, args)
    assert out.micro_batch_size == 2 and out.plan.peak_bytes <= room
    assert torch.equal(out.metagradients, expected.metagradients)


def test_cotangents_lie_beside_a_tape_on_disk():
    """What AdamW's moments need while the model is called is predicted for the disk, not for the device."""
    target, args = model(n_layer=4), TargetTrainingArguments(batch_size=16)
    device, disk = (
        compute_metagradients(target, EXAMPLES * 4, metric, replace(args, tape=tape)).plan
        for tape in ("device", "disk")
    )
    with FlatParameters(list(target.parameters()), []) as flat:
        # one of the two may still be on its way
        assert device.peak_bytes - device.tape_bytes == disk.peak_bytes + 4 * flat.size
        # Without activations the peak is where a step is rebuilt: parameters, moments, two gradients, cotangents.
        disk = memory.plan_memory(ExampleLosses(target, False), flat, replace(args, tape="disk"), 4, [])
        assert disk.peak_bytes == 8 * 4 * flat.size


def test_too_little_room_names_the_place_that_has_it(monkeypatch):
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20, tape="device")
    plan = compute_metagradients(model(), EXAMPLES, metric, args).plan
    monkeypatch.setattr(memory, "_free_memory", lambda device: plan.peak_bytes - plan.tape_bytes // 2)
    with pytest.raises(MemoryError, match='set `tape="disk"`'):
        compute_metagradients(model(), EXAMPLES, metric, args)


def test_psutil_is_what_is_asked():
    assert 0 < memory._free_memory(CPU) <= psutil.virtual_memory().total


def test_a_failed_write_is_an_error_and_no_hang(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    storage = open_storage("disk", str(tmp_path), CPU)
    key = storage.put(torch.ones(3))
    with pytest.raises(OSError, match="No space left|ends early"):
        storage.get(key)
    storage.close()


def test_processes_on_one_machine_share_its_room(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(memory, "_free_memory", lambda device: 8_000_000)
    target, args = model(), TargetTrainingArguments(tape="device")
    for num_processes, room in ((1, "8.0 MB"), (2, "4.0 MB")):
        with FlatParameters(list(target.parameters()), [], num_processes) as flat:
            with pytest.raises(MemoryError, match=f"free are {room} on the device"):
                memory.plan_memory(ExampleLosses(target, False), flat, args, 10**6, [], num_processes)


def test_checkpointing_keeps_less_but_not_under_a_second_derivative():
    fields = {"batch_size": 4, "num_train_epochs": 2}
    plans = {}
    for curvature in ("exact", "central_difference"):
        for checkpointing in (False, True):
            args = TargetTrainingArguments(**fields, curvature=curvature, gradient_checkpointing=checkpointing)
            target = model(n_layer=4)
            plans[curvature, checkpointing] = compute_metagradients(target, EXAMPLES, metric, args).plan.peak_bytes
    assert plans["central_difference", True] < plans["central_difference", False] < plans["exact", False]
    assert plans["exact", True] > plans["exact", False]
