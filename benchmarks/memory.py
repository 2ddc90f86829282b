"""
Prints Markdown tables of peak memory, compared with plain training, and of the size of the tape. On a CPU, each figure comes from a process
of its own, in which freed memory goes back to the operating system. With default settings, the C library would keep up to as much
freed memory as is in use.

    python -m benchmarks.memory > benchmarks/results/memory.md
"""

import argparse
import itertools
import json
import os
import subprocess
import sys

import torch

from benchmarks.common import load, make_args, make_examples, with_lora
from benchmarks.peers.measure import measured
from trl_dpg.metagradients import compute_metagradients, train_and_measure
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.publishing.facts import describe_machine


# (examples, tokens per example of a step; steps K)
SETTINGS = {
    "cpu": {
        "gpt2-shaped": [(32, 64, [2, 8, 16])],
        # In the first, parameters take most of the memory. In the second, activations do.
        "smollm2": [(8, 32, [2]), (32, 64, [2])],
    },
    "cuda": {"gpt2": [(8, 512, [2, 8, 16])], "smollm2": [(8, 32, [2]), (32, 128, [2])]},
}


def measure(
    name: str, method: str, num_steps: int, batch_size: int, length: int, tape: str, lora: bool, device: str
) -> dict:
    """Peak bytes of one run, the model's own included, and where its tape was."""
    examples = make_examples(name, num_steps * batch_size, length)
    model = load(name, device)
    if lora:
        model = with_lora(model)
    metric = LanguageModelingLikelihood(make_examples(name, 1, 16, skip=4096))
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    curvature = "exact" if method == "plain" else method
    args = make_args(name, num_steps, curvature=curvature, tape=tape, batch_size=batch_size, max_length=length)
    function = train_and_measure if method == "plain" else compute_metagradients
    train_and_measure(model, examples[:1], metric, args)  # what libraries load once
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = function(model, examples, metric, args)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        out, _, peak = measured(lambda: function(model, examples, metric, args))
    result = {"peak": peak + weights, "trained": trained}
    if method != "plain" and out.plan is not None:
        result |= {"tape": out.plan.tape_bytes, "place": out.plan.tape}
    return result


def in_a_process(**job) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", "--job", json.dumps(job)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 8, 16], help="only these K")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(**json.loads(options.job))))
        return

    on_cpu, settings = options.device == "cpu", SETTINGS[options.device]
    run = in_a_process if on_cpu else measure
    print(f"{describe_machine(torch.device(options.device))}\n")
    print("Peak of the memory in use, the model included, in MB; over that of plain training of as many steps.\n")
    print(
        "| model | tokens a step | method | tape | K | peak | over plain training | tape, trained parameters a step |"
    )
    print("|---" * 8 + "|")
    off_device = "disk" if on_cpu else "host"
    for name in options.models or settings:
        for batch_size, length, many in settings[name]:
            for lora in (False, True) if name != "smollm2" else (False,):
                for num_steps in [k for k in (many[:1] if lora else many) if k in options.steps]:
                    common = {"name": name, "num_steps": num_steps, "batch_size": batch_size, "length": length}
                    common |= {"lora": lora, "device": options.device}
                    label = f"| {name}{', LoRA' if lora else ''} | {batch_size * length} |"
                    plain = run(method="plain", tape="device", **common)
                    print(f"{label} plain | | {num_steps} | {plain['peak'] / 1e6:.0f} | | |", flush=True)
                    tapes = ["device", off_device] if name != "smollm2" and num_steps == many[-1] else [off_device]
                    for method, tape in itertools.product(("exact", "central_difference"), tapes):
                        out = run(method=method, tape=tape, **common)
                        print(
                            f"{label} {method} | {out['place']} | {num_steps} | {out['peak'] / 1e6:.0f} | "
                            f"{out['peak'] / plain['peak']:.2f} | "
                            f"{out['tape'] / out['trained'] / num_steps:.2f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
