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

from trl_dpg import MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.method.tape import Cotangent, StepInputs, Tape, tape_tensors
from trl_dpg.metagradients.method.updates import SGD, AdamW
from trl_dpg.metagradients.method.updates.optimizer import Block, Optimizer
from trl_dpg.metagradients.runtime import host
from trl_dpg.metagradients.runtime.memory import free_memory, free_room, place_tape
from trl_dpg.metagradients.runtime.storage import AHEAD, DiskStorage, Storage, open_storage
from trl_dpg.testing import tiny_causal_lm


SIZE = 7
CPU = torch.device("cpu")
RULES = {
    "adamw": (AdamW, {}),
    "sgd": (SGD, {"optim": "sgd"}),
    "momentum": (SGD, {"optim": "sgd", "momentum": 0.9, "nesterov": True}),
}


def make_optimizer(name, num_steps, counter=None):
    rule, fields = RULES[name]

    class Counting(rule):
        def update_(self, *args):
            if counter is not None:
                counter.append(1)
            super().update_(*args)

    recipe = TargetTrainingArguments(**fields)
    parts = [
        Block(part, Counting(recipe, weight_decay, 1e-6, torch.Size((SIZE,))))
        for part, weight_decay in ((slice(0, 4), 0.1), (slice(4, SIZE), 0.0))
    ]
    return Optimizer(parts, [0.1 / (k + 1) for k in range(num_steps)], max_grad_norm=2.0)


def cut(optimizer, device, size=None):
    """The optimizer's parts, or pieces of that size."""
    if size is None:
        return optimizer.blocks(0, SIZE, device)
    pieces = []
    for part, rule in optimizer.group_blocks:
        pieces += [Block(slice(i, min(i + size, part.stop)), rule) for i in range(part.start, part.stop, size)]
    return pieces


def load_originals(values):
    values.copy_(torch.arange(float(SIZE)))


def record(tape, optimizer, num_steps, device=CPU):
    """
    Records a run on random gradients; returns every step's state and gradient, copied on the way. Like the engine, has all
    gradients in one place if the storage copies them.
    """
    generator = torch.Generator().manual_seed(0)
    buffer = torch.empty(SIZE, device=device)
    phi = torch.arange(float(SIZE), device=device)
    state = tuple(torch.zeros_like(phi) for _ in range(optimizer.num_states))
    naive = []
    for step in range(num_steps):
        grad = torch.randn(SIZE, generator=generator).to(device)
        if tape.storage.copies:
            tape.storage.settle()
            grad = buffer.copy_(grad)
        naive.append(StepInputs(phi.clone(), tuple(t.clone() for t in state), grad.clone()))
        optimizer.norms.append(grad.norm().item())
        tape.push(StepInputs(phi, state, grad))
        for part, rule in optimizer.group_blocks:
            optimizer.update_(step, rule, phi[part], tuple(t[part] for t in state), grad[part])
    return naive


@pytest.mark.parametrize("size", [None, 3], ids=["parts", "blocks of 3"])
@pytest.mark.parametrize("location", ["device", "host", "disk"])
@pytest.mark.parametrize("num_steps", [*range(1, 11), 31, 64, 96])
@pytest.mark.parametrize("name", RULES)
def test_walks_back_to_the_last_bit(name, num_steps, location, size, tmp_path):
    check_walk(name, num_steps, location, CPU, size, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [None, 3], ids=["parts", "blocks of 3"])
@pytest.mark.parametrize("location", ["device", "host", "disk"])
@pytest.mark.parametrize("name", RULES)
def test_walks_back_to_the_last_bit_on_a_gpu(name, location, size, tmp_path):
    check_walk(name, 31, location, torch.device("cuda"), size, tmp_path)


def check_walk(name, num_steps, location, device, size, tmp_path):
    """
    Parameters and cotangents of every step equal those of an adjoint on states and gradients that were copied on the way.
    Whatever the caller is given may be written to.
    """
    optimizer, storage = make_optimizer(name, num_steps), open_storage(location, str(tmp_path), device)
    tape = Tape(optimizer, cut(optimizer, device, size), num_steps, load_originals, storage)
    naive = record(tape, optimizer, num_steps, device)
    phi = torch.full((SIZE,), torch.nan, device=device)
    cotangent = Cotangent(torch.linspace(-1, 2, SIZE, device=device), tape)
    expected_phi = cotangent.phi.clone()
    expected_state = tuple(torch.zeros_like(phi) for _ in range(optimizer.num_states))
    num_clipped = 0
    for step, before in reversed(list(enumerate(naive))):
        expected = torch.empty_like(phi)
        factor = optimizer.clip_factor(step)
        grad = before.grad * factor if factor < 1 else before.grad
        for part, rule in optimizer.group_blocks:
            state, of_state = (tuple(t[part].clone() for t in ts) for ts in (before.state, expected_state))
            of_phi = expected_phi[part]
            expected[part] = rule.adjoint_(
                step, optimizer.rates[step], before.phi[part], state, grad[part], of_phi, of_state
            )
            for tensor, value in zip(expected_state, of_state, strict=True):
                tensor[part] = value
        if factor < 1:
            num_clipped += 1
            norm, along_grad = optimizer.norms[step], torch.dot(expected, before.grad).item()
            expected.mul_(factor).sub_(before.grad, alpha=factor * along_grad / ((norm + 1e-6) * norm))
        along = torch.full_like(phi, torch.nan)
        inner = optimizer.adjoint_(tape, phi, cotangent, along)
        if factor < 1:
            inner = optimizer.clipping_adjoint_(tape, along, inner)
        tape.pop()
        if factor < 1:  # its inner product is a sum over blocks
            torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
        else:
            assert torch.equal(along, expected)
        assert inner == pytest.approx(
            torch.dot(expected, before.grad).item(), abs=1e-5 * (expected.norm() * before.grad.norm()).item()
        )
        assert torch.equal(phi, before.phi)
        if step > 0:  # before which nothing lies
            assert torch.equal(cotangent.phi, expected_phi)
            for tensor in (phi, along):
                tensor.fill_(torch.nan)
            for tensor in (cotangent.phi, expected_phi):
                tensor.add_(0.1 * step)
    assert num_steps < 3 or 0 < num_clipped < num_steps
    storage.close()


class CountingStorage(Storage):
    def __init__(self):
        self.count = self.peak = 0

    def put(self, tensors):
        self.count += len(tensors)
        self.peak = max(self.peak, self.count)
        return super().put(tensors)

    def drop(self, keys):
        self.count -= len(keys)


@pytest.mark.parametrize("num_steps", [1, 2, 8, 30, 32, 96, 200])
@pytest.mark.parametrize("name", RULES)
def test_size_and_cost(name, num_steps):
    """
    At most 1.1 tensors a step, replays included, beside the cotangents of the state; and replays that grow like a logarithm
    where there is room.
    """
    updates: list[int] = []
    optimizer, storage = make_optimizer(name, num_steps, updates), CountingStorage()
    tape = Tape(optimizer, cut(optimizer, CPU), num_steps, load_originals, storage)
    record(tape, optimizer, num_steps)
    updates.clear()
    cotangent = Cotangent(torch.ones(SIZE), tape)
    for _ in range(num_steps):
        optimizer.adjoint_(tape, torch.empty(SIZE), cotangent, torch.empty(SIZE))
        tape.pop()
    assert storage.count == 0
    blocks, beside = len(tape.blocks), optimizer.num_states if num_steps > 1 else 0
    most = tape_tensors(num_steps, optimizer.num_states)
    assert num_steps <= storage.peak / blocks <= most + beside
    assert most <= 1.1 * num_steps
    assert len(updates) <= 4 * num_steps * blocks


@pytest.mark.parametrize("name", RULES)
def test_few_blocks_are_in_memory(name, tmp_path):
    """However many steps are replayed, and blocks there are: of what lies on disk, few are fetched and not yet done with."""
    alive, most = [], []

    class Watched(DiskStorage):
        def _fetch(self, key):
            data, reading = super()._fetch(key)
            alive.append(weakref.ref(data))
            most.append(sum(ref() is not None for ref in alive))
            return data, reading

    optimizer, storage = make_optimizer(name, 20), Watched(str(tmp_path), CPU)
    tape = Tape(optimizer, cut(optimizer, CPU, 2), 20, load_originals, storage)
    record(tape, optimizer, 20)
    cotangent = Cotangent(torch.ones(SIZE), tape)
    for _ in range(20):
        optimizer.adjoint_(tape, torch.empty(SIZE), cotangent, torch.empty(SIZE))
        tape.pop()
    storage.close()
    assert len(most) > 200 and max(most) <= 2 * AHEAD + 8


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


# Where it goes


MEGABYTE = 1_000_000
ROOM = {"device": 100 * MEGABYTE, "host": 300 * MEGABYTE, "disk": 900 * MEGABYTE}


@pytest.mark.parametrize(
    ("needed", "tape", "place"),
    [(50, "auto", "device"), (51, "auto", "host"), (151, "auto", "disk"), (900, "auto", "disk"), (100, "device", "device"),
     (300, "host", "host"), (1, "disk", "disk")],
)  # fmt: skip
def test_auto_takes_what_has_room(needed, tape, place):
    """Half of the memory that is free, as the run needs some too; what is asked for may take all."""
    plan = place_tape(TargetTrainingArguments(tape=tape), needed * MEGABYTE, 0, ROOM)
    assert (plan.tape, plan.tape_bytes) == (place, needed * MEGABYTE)


def test_a_run_is_placed_by_its_size():
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20)
    plan = compute_metagradients(model(), EXAMPLES, metric, args).plan
    size = 4 * sum(p.numel() for p in model().parameters())
    assert plan.tape == "device" and 160 * size <= plan.tape_bytes


@pytest.mark.parametrize(
    ("needed", "tape", "room", "advice"),
    [
        (901, "auto", ROOM, "`tape_dir`"),
        (101, "device", ROOM, 'set `tape="host"`'),
        (301, "host", ROOM, 'set `tape="disk"`'),
        (1, "auto", dict.fromkeys(ROOM, 0), "adapters"),
    ],
)
def test_too_little_room_says_what_would_help(needed, tape, room, advice):
    with pytest.raises(MemoryError, match=f"`tape='{tape}'`.*{advice}"):
        place_tape(TargetTrainingArguments(tape=tape), needed * MEGABYTE, MEGABYTE // 2, room)


def test_processes_on_one_machine_share_its_room(tmp_path):
    one, two = (free_room(CPU, str(tmp_path), count) for count in (1, 2))
    for place in one:
        assert two[place] == pytest.approx(one[place] / 2, rel=0.2)


def test_psutil_is_what_is_asked():
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


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
def test_a_container_has_what_its_limit_leaves(kind, tmp_path):
    membership, folder, limit, used, prefix = GROUPS[kind]
    (tmp_path / "membership").write_text(membership + "\n")
    places = tmp_path / "membership", tmp_path
    assert host.host_memory(*places)[0] == psutil.virtual_memory().total  # no limit is known
    group = tmp_path / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text("50000000\n")
    (group / used).write_text("30000000\n")
    (group / "memory.stat").write_text(f"rss 1\n{prefix}inactive_file 4000000\n{prefix}active_file 1000000\n")
    assert host.host_memory(*places) == (50_000_000, 25_000_000)
    inner = group / "none"  # a group within, without a limit of its own
    inner.mkdir()
    (inner / limit).write_text("max\n" if "version 2" in kind else "9223372036854771712\n")
    assert host.host_memory(*places) == (50_000_000, 25_000_000)


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
    with pytest.raises(ValueError, match='`tape="disk"` needs a directory on a disk.*`tape_dir`'):
        compute_metagradients(model(), EXAMPLES, metric, replace(args, tape="disk"))
    room = {**free_room(CPU, None, 1), "device": 0, "host": 0}
    assert room["disk"] == 0
    with pytest.raises(MemoryError, match=r"0.0 MB on disk \(none known.*point `tape_dir` to a disk"):
        place_tape(args, 1, 0, room)
    assert (
        free_room(CPU, temporary, 1)["disk"] <= free_room(CPU, None, 1)["host"] * 1.1
    )  # memory by the name of a disk


def test_a_reward_says_once_where_its_tape_is(monkeypatch, caplog, tokenizer):
    args = TargetTrainingArguments(batch_size=1, num_train_epochs=20, adam_epsilon_root=1e-9)
    target = tiny_causal_lm(hidden_size=8, num_layers=1, num_heads=1)
    reward = MetagradientReward(target, metric, args, tokenizer)
    batch = {"prompts": ["say"] * 2, "completions": ["blue day", "cold cup"], "completion_ids": [[1, 2], [3, 4]]}
    reward(**batch)
    assert caplog.text == ""
    with monkeypatch.context() as patch:
        memory = psutil.virtual_memory()._replace(available=10_000)
        patch.setattr(psutil, "virtual_memory", lambda: memory)
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
