"""
Prints a Markdown table of what metagradients cost by this code and by an earlier commit, measured in turns on one machine.

    python -m benchmarks.compare --before a7ea205 > benchmarks/results/compare.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch


ROOT = Path(__file__).parent.parent
METHODS = {
    "plain training": {},
    "exact": {},
    "central differences": {"curvature": "central_difference"},
    "exact, SGD": {"optim": "sgd"},
    "exact, tape on disk": {"tape": "disk"},
    "exact, LoRA": {},
}
SHAPES = {1: (8, 64), 8: (16, 64)}  # steps K: examples a step, tokens each


def work() -> None:
    """Answers requests, one JSON object a line, with the processor time of a call. Both versions of the code run this function."""
    from benchmarks.common import load, make_args, make_examples, with_lora
    from benchmarks.cost import keep_freed_memory
    from trl_dpg.metagradients import compute_metagradients, train_and_measure
    from trl_dpg.metrics import LanguageModelingLikelihood

    keep_freed_memory()
    torch.set_num_threads(1)
    name = "gpt2-shaped"
    models = load(name, "cpu"), with_lora(load(name, "cpu"))
    metric = LanguageModelingLikelihood(make_examples(name, 1, 16, skip=4096))
    for line in sys.stdin:
        method, num_steps = json.loads(line)
        batch_size, length = SHAPES[num_steps]
        examples = make_examples(name, batch_size * num_steps, length)
        args = replace(make_args(name, num_steps, batch_size=batch_size, max_length=length), **METHODS[method])
        function = train_and_measure if method == "plain training" else compute_metagradients
        start = time.process_time()
        function(models["LoRA" in method], examples, metric, args)
        print(json.dumps(time.process_time() - start), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="commit to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    if options.before is None:
        parser.error("--before is missing: name a commit")
    print(
        f"gpt2-shaped, one thread. Seconds of processor time: medians of {options.repeats} rounds; each runs {options.before} and this"
    )
    print("code in turn. Ratio: median over the rounds, in brackets the lowest and the highest.\n")
    print("| method | K | before, s | after, s | after / before |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        archive = subprocess.run(["git", "archive", options.before], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
        Path(directory, "benchmarks/compare.py").write_text(Path(__file__).read_text())
        workers = [start(Path(directory)), start(ROOT)]
        for method in METHODS:
            for num_steps in SHAPES:
                rounds = [[ask(worker, method, num_steps) for worker in workers] for _ in range(options.repeats + 1)][
                    1:
                ]
                before, after = (statistics.median(row[i] for row in rounds) for i in range(2))
                ratios = [row[1] / row[0] for row in rounds]
                spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
                print(f"| {method} | {num_steps} | {before:.3f} | {after:.3f} | {spread} |", flush=True)
        for worker in workers:
            worker.kill()


def start(root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.compare", "--work"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(worker: subprocess.Popen, method: str, num_steps: int) -> float:
    worker.stdin.write(json.dumps([method, num_steps]) + "\n")  # type: ignore[union-attr]
    worker.stdin.flush()  # type: ignore[union-attr]
    return json.loads(worker.stdout.readline())  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
