"""The tape against naively stored states, its size, and what is left of it."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from examples.resources import tiny_causal_lm
from trl_dpg import MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, host, memory
from trl_dpg.metagradients.flat import FlatParameters
from trl_dpg.metagradients.losses import TokenLosses, micro_batches, prepare_examples
from trl_dpg.metagradients.optimizers import Hyperparameters, Moments, Optimizer, clip_factor
from trl_dpg.metagradients.storage import AHEAD, DeviceStorage, DiskStorage, open_storage
from trl_dpg.metagradients.tape import Tape, tape_tensors


SIZE = 7
CPU = torch.device("cpu")


def make_optimizer(optim, num_steps):
    table = [Hyperparameters(k + 1, 0.1 / (k + 1), 0.1, 0.9, 0.95, 1e-8, 1e-6) for k in range(num_steps)]
    return Optimizer(optim, table, num_decayed=4, max_grad_norm=2.0)


def load_originals(values):
    torch.arange(float(SIZE), out=values)


def record(tape, optimizer, num_steps, device=CPU):
    """
    Records a run on random gradients; returns every step's state and gradient, copied on the way. Like the engine, has all
    gradients in one place if the storage copies them.
    """
    generator = torch.Generator().manual_seed(0)
    buffer = torch.empty(SIZE, device=device)
    values = torch.arange(float(SIZE), device=device)
    moments = optimizer.initial_moments(values)
    naive = []
    for step in range(num_steps):
        grad = torch.randn(SIZE, generator=generator).to(device)
        if tape.storage.copies:
            tape.storage.settle()
            grad = buffer.copy_(grad)
        state = [values, *(moments or ())]
        naive.append([t.clone() for t in (*state, grad)])
        optimizer.measure(grad)
        tape.record(state, grad)
        optimizer.update_(step, values, moments, grad)
    return naive


@pytest.fixture(params=[None, 3], ids=["one block", "blocks of 3"])
def blocks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(Optimizer, "BLOCK", {"cpu": request.param, "cuda": request.param})


@pytest.mark.parametrize("location", ["device", "host", "disk"])
@pytest.mark.parametrize("num_steps", [*range(1, 11), 31, 64, 96])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_walks_back_to_the_last_bit(optim, num_steps, location, blocks, tmp_path):
    check_walk(optim, num_steps, location, CPU, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("location", ["device", "host", "disk"])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_walks_back_to_the_last_bit_on_a_gpu(optim, location, blocks, tmp_path):
    check_walk(optim, 31, location, torch.device("cuda"), tmp_path)


def check_walk(optim, num_steps, location, device, tmp_path):
    """
    Parameters and cotangents of every step equal those of an adjoint on states and gradients that were copied on the way.
    Whatever the caller is given may be written to.
    """
    optimizer, storage = make_optimizer(optim, num_steps), open_storage(location, str(tmp_path), device)
    tape = Tape(optimizer, num_steps, load_originals, storage)
    naive = record(tape, optimizer, num_steps, device)
    values = torch.full((SIZE,), torch.nan, device=device)
    cotangent = torch.linspace(-1, 2, SIZE, device=device)
    expected_cotangent, expected_moments = cotangent.clone(), optimizer.initial_moments(cotangent)
    clipped = 0
    for step, (expected_values, *moments, grad) in reversed(list(enumerate(naive))):
        of_grad, inner, spare = tape.rewind(values, cotangent)
        expected = torch.empty_like(grad)
        before = Moments(*moments) if optim == "adamw" and step > 0 else None
        expected_inner = optimizer.adjoint_(step, expected_cotangent, expected_moments, grad, before, expected).item()
        assert torch.equal(of_grad, expected) and inner == pytest.approx(expected_inner)
        if clip_factor(grad.norm().item(), optimizer.max_grad_norm) < 1:
            clipped += 1
            inner = tape.rewind_clipping(of_grad, expected_inner)
            expected_inner = optimizer.clip_adjoint_(step, expected, grad, expected_inner).item()
            assert torch.equal(of_grad, expected) and inner == pytest.approx(expected_inner, abs=1e-5)
        assert torch.equal(values, expected_values)
        if step > 0:  # before which nothing lies
            assert torch.equal(cotangent, expected_cotangent)
            for tensor in (values, of_grad, *([] if spare is None else [spare])):
                tensor.fill_(torch.nan)
            for tensor in (cotangent, expected_cotangent):
                tensor.add_(0.1 * step)
    assert num_steps < 3 or 0 < clipped < num_steps
    storage.close()


class CountingStorage(DeviceStorage):
    def __init__(self):
        self.count = self.peak = 0

    def put(self, tensors):
        self.count += len(tensors)
        self.peak = max(self.peak, self.count)
        return super().put(tensors)

    def drop(self, key):
        self.count -= 1


@pytest.mark.parametrize("num_steps", [1, 2, 8, 30, 32, 96, 200])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_size_and_cost(optim, num_steps, monkeypatch):
    """
    At most 1.1 tensors a step, replays included, beside the cotangents of the moments; and replays that grow like a logarithm
    where there is room.
    """
    optimizer, storage = make_optimizer(optim, num_steps), CountingStorage()
    tape = Tape(optimizer, num_steps, load_originals, storage)
    record(tape, optimizer, num_steps)
    updates = []
    update = Optimizer.update_
    monkeypatch.setattr(Optimizer, "update_", lambda *args: updates.append(1) or update(*args))
    for step in reversed(range(num_steps)):
        of_grad, _, _ = tape.rewind(torch.empty(SIZE), torch.ones(SIZE))
        if optimizer.clips(step):
            tape.rewind_clipping(of_grad, 0.0)
    assert storage.count == 0
    aside = 2 if optim == "adamw" and num_steps > 1 else 0
    assert num_steps <= storage.peak <= tape_tensors(num_steps, optim) + aside
    assert tape_tensors(num_steps, optim) <= 1.1 * num_steps
    assert len(updates) <= 4 * num_steps


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_few_blocks_are_in_memory(optim, monkeypatch, tmp_path):
    """However many steps are replayed, and blocks there are: of what lies on disk, few are fetched and not yet done with."""
    monkeypatch.setattr(Optimizer, "BLOCK", {"cpu": 2})
    optimizer, storage = make_optimizer(optim, 20), open_storage("disk", str(tmp_path), CPU)
    tape = Tape(optimizer, 20, load_originals, storage)
    record(tape, optimizer, 20)
    fetched, alive, most = storage._fetch, [], []

    def fetch(key):
        data, reading = fetched(key)
        alive.append(weakref.ref(data))
        most.append(sum(ref() is not None for ref in alive))
        return data, reading

    monkeypatch.setattr(storage, "_fetch", fetch)
    for _ in range(20):
        tape.rewind(torch.empty(SIZE), torch.ones(SIZE))
    storage.close()
    assert len(most) > 200 and max(most) <= AHEAD + 8


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


def test_a_slow_disk_changes_no_bit(monkeypatch, tmp_path):
    """The next gradient goes where the last one was, but not before that is written."""
    args = TargetTrainingArguments(batch_size=2, learning_rate=1e-3, tape="disk", tape_dir=str(tmp_path))
    expected = compute_metagradients(model(), EXAMPLES, metric, args)
    transfer = DiskStorage._transfer

    def slowly(self, *call):
        time.sleep(0.05)
        transfer(self, *call)

    monkeypatch.setattr(DiskStorage, "_transfer", slowly)
    out = compute_metagradients(model(), EXAMPLES, metric, args)
    assert torch.equal(out.metagradients, expected.metagradients)


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (5, 8), (64, 64), (65, 65), (64 * 3 + 33, 64 * 4)])
def test_pinned_memory_is_rounded_up(size, expected):
    assert memory._pinned_bytes(size, 64) == expected


def test_the_file_has_no_name(tmp_path):
    storage = open_storage("disk", str(tmp_path), CPU)
    keys = [*storage.put([torch.full((3,), 0.0), torch.full((3,), 1.0)]), *storage.put([torch.full((3,), 2.0)])]
    assert [tensor.tolist() for tensor in storage.stream(keys)] == [[i] * 3 for i in range(3)]
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


@pytest.fixture
def small_blocks(monkeypatch):
    """A block is a small part of these models, too."""
    monkeypatch.setattr(Optimizer, "BLOCK", {"cpu": 16})


def test_auto_takes_what_has_room(monkeypatch, tmp_path):
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20, tape_dir=str(tmp_path))
    out = compute_metagradients(model(), EXAMPLES, metric, args)
    assert out.plan.tape == "device"
    assert out.plan.tape_bytes >= 160 * 4 * sum(p.numel() for p in model().parameters())
    room = out.plan.peak_bytes - out.plan.tape_bytes // 2
    monkeypatch.setattr(memory, "_free_memory", lambda device: room)
    assert compute_metagradients(model(), EXAMPLES, metric, args).plan.tape == "disk"


@pytest.mark.parametrize("tape", ["auto", "device", "disk"])
def test_too_little_room_is_an_error_before_the_first_step(tape, monkeypatch, small_blocks, tmp_path):
    """One example at a time would need a little more than there is."""
    target = model()
    args = TargetTrainingArguments(batch_size=4, num_train_epochs=20, tape=tape, tape_dir=str(tmp_path))
    plan = compute_metagradients(target, EXAMPLES, metric, replace(args, tape="disk", micro_batch_size=1)).plan
    calls = []
    target.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    monkeypatch.setattr(memory, "_free_memory", lambda device: plan.peak_bytes - plan.activation_bytes)
    with pytest.raises(MemoryError, match=r"needs .* MB .*central_difference.*adapters"):
        compute_metagradients(target, EXAMPLES, metric, args)
    assert len(calls) == 4  # the passes that measure: gradients, and second derivatives


def test_too_little_room_for_the_batch_takes_smaller_micro_batches(monkeypatch, small_blocks):
    args = TargetTrainingArguments(batch_size=4, num_train_epochs=2, tape="disk")
    plan = compute_metagradients(model(), EXAMPLES, metric, args).plan
    expected = compute_metagradients(model(), EXAMPLES, metric, replace(args, micro_batch_size=2))
    room = plan.peak_bytes - plan.activation_bytes // 2
    monkeypatch.setattr(memory, "_free_memory", lambda device: room)
    out = compute_metagradients(model(), EXAMPLES, metric, args)
    assert out.micro_batch_size == 2 and out.plan.peak_bytes <= room
    assert torch.equal(out.metagradients, expected.metagradients)


def test_cotangents_lie_beside_a_tape_on_disk(small_blocks):
    """What AdamW's moments need while the model is called is predicted for the disk, not for the device."""
    target, args = model(n_layer=4), TargetTrainingArguments(batch_size=16)
    device, disk = (
        compute_metagradients(target, EXAMPLES * 4, metric, replace(args, tape=tape)).plan
        for tape in ("device", "disk")
    )
    with FlatParameters(list(target.parameters()), []) as flat:
        assert device.peak_bytes - device.tape_bytes == disk.peak_bytes + 2 * 4 * flat.size
        # Without activations and double backward, the peak is in the forward sweep.
        args = replace(args, tape="disk", curvature="central_difference")
        disk = memory.plan_memory(TokenLosses(target, False), flat, args, 4, [])
        assert disk.peak_bytes == 5 * 4 * flat.size


def test_long_texts_keep_attention_under_double_backward_alone():
    """The fused kernel keeps no matrix of attention, but has no second derivative either."""
    args = TargetTrainingArguments(batch_size=2, max_length=256, tape="disk")
    peaks = {}
    for implementation in ("sdpa", "eager"):
        config = GPT2Config(
            vocab_size=11, n_positions=256, n_embd=8, n_layer=2, n_head=4, attn_implementation=implementation
        )
        target = GPT2LMHeadModel(config).eval()
        examples = prepare_examples([{"input_ids": [1] * 256}] * 2, 256, 11)
        batches = micro_batches(examples, [0, 1], args, CPU, torch.float32)
        for curvature in ("exact", "central_difference"):
            with FlatParameters(list(target.parameters()), []) as flat:
                plan = memory.plan_memory(
                    TokenLosses(target, False), flat, replace(args, curvature=curvature), 2, batches
                )
            peaks[implementation, curvature] = plan.peak_bytes
    assert 0.8 < peaks["sdpa", "exact"] / peaks["eager", "exact"] < 1.25
    assert peaks["sdpa", "central_difference"] < 0.5 * peaks["eager", "central_difference"]


def test_too_little_room_names_the_place_that_has_it(monkeypatch):
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20, tape="device")
    plan = compute_metagradients(model(), EXAMPLES, metric, args).plan
    monkeypatch.setattr(memory, "_free_memory", lambda device: plan.peak_bytes - plan.tape_bytes // 2)
    with pytest.raises(MemoryError, match='set `tape="disk"`'):
        compute_metagradients(model(), EXAMPLES, metric, args)


def test_psutil_is_what_is_asked():
    assert 0 < memory._free_memory(CPU) <= psutil.virtual_memory().total


GROUPS = {
    "version 2, in a container": ("0::/", "", "memory.max", "memory.current", ""),
    "version 2, by the machine": ("1:name=systemd:/\n0::/user/job", "user/job", "memory.max", "memory.current", ""),
    "version 1": (
        "8:cpu:/\n4:memory:/docker/ab\n0::/",
        "memory/docker/ab",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
    "version 1, seen from within": (
        "4:cpu,memory:/docker/ab",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_a_container_has_what_its_limit_leaves(kind, monkeypatch, tmp_path):
    membership, folder, limit, used, prefix = GROUPS[kind]
    (tmp_path / "membership").write_text(membership + "\n")
    monkeypatch.setattr(host, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    assert host.host_memory()[0] == psutil.virtual_memory().total  # no limit is known
    group = tmp_path / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text("50000000\n")
    (group / used).write_text("30000000\n")
    (group / "memory.stat").write_text(f"rss 1\n{prefix}inactive_file 4000000\n{prefix}active_file 1000000\n")
    assert host.host_memory() == (50_000_000, 25_000_000)
    assert memory._free_memory(CPU) == 25_000_000
    inner = group / "none"  # a group within, without a limit of its own
    inner.mkdir()
    (inner / limit).write_text("max\n" if "version 2" in kind else "9223372036854771712\n")
    assert host.host_memory() == (50_000_000, 25_000_000)


@pytest.fixture
def mounts(monkeypatch, tmp_path):
    """A machine whose directory for temporary files is in memory, and `/var/tmp`, too, if asked."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def make(*in_memory):
        table = [SimpleNamespace(mountpoint=place, fstype="tmpfs") for place in in_memory]
        table.insert(0, SimpleNamespace(mountpoint="/", fstype="ext4"))
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: table)

    return make


def test_a_tape_on_disk_is_on_a_disk(mounts, monkeypatch, tmp_path):
    temporary = str(tmp_path / "temporary")
    mounts()
    assert host.tape_directory(None) == temporary
    mounts(temporary)
    assert host.tape_directory(None) == "/var/tmp"
    assert host.tape_directory(temporary) == temporary  # who asks for it has it
    assert host.is_in_memory(f"{temporary}/deep/er") and not host.is_in_memory(f"{temporary}-not")

    mounts(temporary, os.path.realpath("/var/tmp"))
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20)
    plan = compute_metagradients(model(), EXAMPLES, metric, args).plan
    with pytest.raises(ValueError, match='`tape="disk"` needs a directory on a disk.*`tape_dir`'):
        compute_metagradients(model(), EXAMPLES, metric, replace(args, tape="disk"))
    monkeypatch.setattr(memory, "_free_memory", lambda device: plan.peak_bytes - plan.tape_bytes // 2)
    with pytest.raises(MemoryError, match=r"0.0 MB on disk \(none known.*point `tape_dir` to a disk"):
        compute_metagradients(model(), EXAMPLES, metric, args)
    with pytest.raises(MemoryError):  # nor does it help to ask for memory by the name of a disk
        compute_metagradients(model(), EXAMPLES, metric, replace(args, tape="disk", tape_dir=temporary))
    mounts()
    assert compute_metagradients(model(), EXAMPLES, metric, args).plan.tape == "disk"


def test_a_reward_says_once_where_its_tape_is(monkeypatch, caplog, tokenizer):
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20, adam_epsilon_root=1e-9)
    target = tiny_causal_lm(hidden_size=8, num_layers=1, num_heads=1)
    reward = MetagradientReward(target, metric, args, tokenizer)
    batch = {"prompts": ["say"] * 2, "completions": ["blue day", "cold cup"], "completion_ids": [[1, 2], [3, 4]]}
    plan = compute_metagradients(target, EXAMPLES[:2], metric, args).plan
    reward(**batch)
    assert caplog.text == ""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_free_memory", lambda device: plan.peak_bytes - plan.tape_bytes // 2)
        for _ in range(3):
            reward(**batch)
    reward(**batch)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" from here on")[0] for text in said] == [
        f"The target's tape lies on {place}" for place in ("disk", "device")
    ]


def test_a_failed_write_is_an_error_and_no_hang(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    storage = open_storage("disk", str(tmp_path), CPU)
    keys = storage.put([torch.ones(3)])
    with pytest.raises(OSError, match="No space left|ends early"):
        next(storage.stream(keys))
    storage.close()


def test_processes_on_one_machine_share_its_room(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(memory, "_free_memory", lambda device: 8_000_000)
    target, args = model(), TargetTrainingArguments(tape="device")
    for num_processes, room in ((1, "8.0 MB"), (2, "4.0 MB")):
        with FlatParameters(list(target.parameters()), [], num_processes) as flat:
            with pytest.raises(MemoryError, match=f"free are {room} on the device"):
                memory.plan_memory(TokenLosses(target, False), flat, args, 10**6, [], num_processes)


def test_checkpointing_keeps_less_but_not_under_a_second_derivative(small_blocks):
    fields = {"batch_size": 4, "num_train_epochs": 2}
    plans = {}
    for curvature in ("exact", "central_difference"):
        for checkpointing in (False, True):
            args = TargetTrainingArguments(**fields, curvature=curvature, gradient_checkpointing=checkpointing)
            target = model(n_layer=4)
            plans[curvature, checkpointing] = compute_metagradients(target, EXAMPLES, metric, args).plan.peak_bytes
    assert plans["central_difference", True] < plans["central_difference", False] < plans["exact", False]
    assert plans["exact", True] > plans["exact", False]
