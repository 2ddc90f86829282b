"""
Prints Markdown tables. One compares the peak memory of a process that holds a share of the target with that of a process that holds the whole
target. Another says which targets fit on how many GPUs, from counted bytes alone.

    python -m benchmarks.sharded_memory > benchmarks/results/sharded_memory.md
"""

import argparse
import ctypes
import multiprocessing
import os
import socket
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers.measure import measured
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadNorm
from trl_dpg.publishing.facts import describe_machine
from trl_dpg.target import shard_target_model


WIDTH, LAYERS, VOCABULARY = 512, 12, 1024
BATCH, LENGTH, STEPS = 6, 16, 2

# Bytes per trained parameter, as docs/memory.md counts them, of a whole target and of one in shards; the tape is on the host.
WHOLE = {"exact": 30, "central differences": 20}
SHARED = {"exact": 24, "central differences": 20}
GATHERED = {
    "exact": 3,
    "central differences": 2,
}  # whole tensors of the largest parameter at once: itself, its gradient, its direction
GPU, REST = 80e9, 10e9  # bytes of a GPU, and of them for activations of a micro-batch, communication and CUDA itself
TARGETS = {  # parameters, and those of the largest one, the LM head
    "Llama-3.2-1B": (1.24e9, 128256 * 2048),
    "Llama-3.2-3B": (3.21e9, 128256 * 3072),
    "Llama-3.1-8B": (8.03e9, 128256 * 4096),
    "Qwen2.5-32B": (32.8e9, 152064 * 5120),
    "Llama-3.1-70B": (70.6e9, 128256 * 8192),
    "Llama-3.1-405B": (405.9e9, 128256 * 16384),
}


def measure(curvature: str, rank: int, count: int, port: int, results: Any) -> None:
    """Run on every process: puts its peak, weights included, into a queue."""
    ctypes.CDLL(None).mallopt(-3, 100_000)  # larger blocks go back to the operating system as soon as they are freed
    if count > 1:
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    state = PartialState(cpu=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=4, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    layer = sum(p.nbytes for p in model.transformer.h[0].parameters())
    if count > 1:
        shard_target_model(model, init_device_mesh("cpu", (count,)))
    weights = sum((p.to_local() if count > 1 else p).nbytes for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (BATCH * STEPS, LENGTH), generator=generator).tolist()
    examples = [{"input_ids": row} for row in ids]
    fields = {"curvature": curvature, "curvature_tolerance": 1e9}  # no step of central differences is repeated exactly
    args = TargetTrainingArguments(batch_size=BATCH, adam_epsilon_root=1e-9, tape="disk", disable_tqdm=True, **fields)
    compute = lambda rows: compute_metagradients(model, rows, LMHeadNorm(), args, accelerator=state)  # noqa: E731
    compute(examples[:count])  # what libraries load once
    _, _, peak = measured(lambda: compute(examples))
    results.put({"peak": peak + weights, "layer": layer})
    state.destroy_process_group()


def in_processes(count: int, curvature: str) -> dict:
    """The highest peak of `count` processes, and the bytes of a layer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=measure, args=(curvature, rank, count, port, results)) for rank in range(count)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return max(found, key=lambda result: result["peak"])


def print_measured() -> None:
    print(f"{describe_machine(torch.device('cpu'))}\n")
    print(
        f"A GPT-2 of {LAYERS} layers and width {WIDTH}, K = {STEPS}, AdamW, {BATCH * LENGTH} tokens a step over all processes, the tape on disk. Peak of "
        "the memory in use by a process (the highest among them, its weights included), in MB. The bound is that of one process over "
        "their number, plus one layer.\n"
    )
    print("| method | processes | peak | bound | peak over the bound |\n|---|---|---|---|---|")
    for curvature in ("exact", "central_difference"):
        whole = None
        for count in (1, 2, 3):
            found = in_processes(count, curvature)
            whole = whole or found["peak"]
            bound = whole / count + (found["layer"] if count > 1 else 0)
            row = f"{found['peak'] / 1e6:.0f} | {bound / 1e6:.0f} | {found['peak'] / bound:.2f}"
            print(f"| {curvature.replace('_', ' ')} | {count} | {row} |", flush=True)


def needed(parameters: float, largest: float, count: int, method: str) -> float:
    """Bytes on each of `count` GPUs, activations left out; with LoRA, those of the base in bfloat16, and of its LM head in float32."""
    if method == "LoRA":
        return 2 * parameters / count + (4 if count == 1 else 6) * largest
    if count == 1:
        return WHOLE[method] * parameters
    return SHARED[method] * parameters / count + 4 * GATHERED[method] * largest


def print_sizes() -> None:
    print(
        f"\nCounted, not measured: GB on each GPU of {GPU / 1e9:.0f} GB for all parameters trained in float32 with AdamW, the tape on the host; or for LoRA, exactly, on a base in bfloat16. In bold what "
        f"leaves {REST / 1e9:.0f} GB for activations, communication and CUDA. The last column is the tape of one step of all parameters, over all GPUs, in GB.\n"
    )
    counts, methods = (1, 8, 64), [*SHARED, "LoRA"]
    print("| target |" + "".join(f" {count}, {method} |" for method in methods for count in counts) + " tape |")
    print("|---" * (2 + len(counts) * len(methods)) + "|")
    for name, (parameters, largest) in TARGETS.items():
        cells = []
        for method in methods:
            for count in counts:
                gigabytes = needed(parameters, largest, count, method) / 1e9
                cells.append(f"**{gigabytes:.0f}**" if gigabytes <= (GPU - REST) / 1e9 else f"{gigabytes:.0f}")
        print(f"| {name} | {' | '.join(cells)} | {4.4 * parameters / 1e9:.0f} |")


def main() -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)  # set here, because a thread pool does not survive a fork
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", action="store_true", help="only what is counted")
    options = parser.parse_args()
    if not options.sizes:
        print_measured()
    print_sizes()


if __name__ == "__main__":
    main()
