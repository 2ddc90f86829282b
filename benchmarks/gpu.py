"""
Measures on a GPU what a CPU cannot show. Each part saves its table while it runs. Nothing is downloaded.

    make gpu                                      # all parts, nine minutes at most
    python -m benchmarks.gpu --parts cost_gpt2    # one of them

A part is a process of its own with a time limit. The output until then is kept. `--device cpu` runs all parts with tiny models and few
rounds, to see that they work.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from benchmarks.common import load, make_args, make_examples, with_lora
from experiments.corpora import smollm2, wikipedia_leads
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metagradients import compute_metagradients, train_and_measure
from trl_dpg.metrics import LanguageModelingLikelihood
from trl_dpg.publishing.facts import describe_machine
from trl_dpg.testing import tiny_causal_lm, tiny_prompts, tiny_tokenizer


# Part: seconds it may take, and its command on a GPU and, to try it, on a CPU
PYTHON = [sys.executable, "-m"]
PARTS: dict[str, tuple[int, list[str], list[str]]] = {
    "tests": (80, ["pytest", "-q", "tests/metagradients/test_cuda.py"], ["pytest", "-q", "tests/metagradients/test_cuda.py"]),
    "cost_gpt2": (
        80,
        ["benchmarks.cost", "--device", "cuda", "--model", "gpt2", "--repeats", "3"],
        ["benchmarks.cost", "--model", "gpt2-shaped", "--repeats", "1", "--steps", "1", "--tokens", "512"],
    ),
    "cost_smollm2": (
        80,
        ["benchmarks.cost", "--device", "cuda", "--model", "smollm2", "--repeats", "3"],
        ["benchmarks.cost", "--model", "gpt2-shaped", "--repeats", "1", "--steps", "1", "--tokens", "512"],
    ),
    "memory": (
        50,
        ["benchmarks.memory", "--device", "cuda"],
        ["benchmarks.memory", "--models", "gpt2-shaped", "--steps", "2"],
    ),
    "compiled": (60, ["benchmarks.gpu", "--part", "compiled"], ["benchmarks.gpu", "--part", "compiled", "--device", "cpu"]),
    "step": (70, ["benchmarks.gpu", "--part", "step"], ["benchmarks.gpu", "--part", "step", "--device", "cpu"]),
    "uuid": (
        120,
        ["benchmarks.gpu", "--part", "uuid", "--seconds", "60"],
        ["benchmarks.gpu", "--part", "uuid", "--device", "cpu", "--seconds", "2"],
    ),
}  # fmt: skip
UUID = "7f3c9a51e2d84b06a1c5f0e79d2b8364"


def run_parts(names: list[str], device: str, output: Path, limited: bool = True) -> bool:
    """Runs parts one after the other, and prints how each ended."""
    output.mkdir(parents=True, exist_ok=True)
    all_well = True
    for name in names:
        seconds, on_gpu, on_cpu = PARTS[name]
        limit = seconds if limited else None
        start, path = time.perf_counter(), output / f"{name}.md"
        with path.open("w") as file, (output / f"{name}.log").open("w") as log:
            try:
                code = subprocess.run(
                    [*PYTHON, *(on_gpu if device == "cuda" else on_cpu)], stdout=file, stderr=log, timeout=limit
                ).returncode
                ended = "done" if code == 0 else f"FAILED, see {log.name}"
                all_well &= code == 0
            except subprocess.TimeoutExpired:
                ended = f"stopped after {limit} s"
        print(f"{name}: {ended}, {time.perf_counter() - start:.0f} s. {path}", flush=True)
    return all_well


def compiled(device: str) -> None:
    """The effect of `torch.compile`: seconds of plain training and of central differences, with and without it."""
    name, batch_size, length = ("smollm2", 32, 128) if device == "cuda" else ("gpt2-shaped", 2, 16)
    num_steps = 4
    examples = make_examples(name, batch_size * num_steps, length)
    metric = LanguageModelingLikelihood(make_examples(name, 1, 16, skip=4096))
    exact = make_args(name, num_steps, batch_size=batch_size, max_length=length)
    model = load(name, device)
    seconds, found = {}, []
    for way in ("as it is", "compiled"):
        if way == "compiled":
            model.compile(dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
        for function, args in (
            (train_and_measure, exact),
            (compute_metagradients, replace(exact, curvature="central_difference")),
        ):
            function(model, examples, metric, args)  # to warm up
            start = time.perf_counter()
            out = function(model, examples, metric, args)
            synchronize(device)
            seconds[way, function] = time.perf_counter() - start
        found.append(out.metagradients)
    print(f"{name}, K = {num_steps}, {batch_size} x {length} tokens a step, float32.\n")
    print("| model | plain training, s | central differences, s |\n|---|---|---|")
    for way in ("as it is", "compiled"):
        print(f"| {way} | {seconds[way, train_and_measure]:.2f} | {seconds[way, compute_metagradients]:.2f} |")
    error = ((found[1] - found[0]).norm() / found[0].norm()).item()
    print(f"\nMetagradients of the two differ by {error:.1e}, relative.")


def trainer(device: str, directory: str, **fields) -> DatasetPolicyGradientTrainer:
    """A trainer whose goal is a UUID: SmolLM2-135M-Instruct as generator (LoRA) and target. On a CPU: random GPT-2s, three words."""
    if device == "cuda":
        generator, target = with_lora(load("smollm2", device)), load("smollm2", device)
        tokenizers = [AutoTokenizer.from_pretrained(smollm2()) for _ in range(2)]
        leads = wikipedia_leads()["text"]
        train, test = ([{"prompt": f"Rephrase: {text[:200]}"} for text in part] for part in (leads[64:], leads[:64]))
        sizes = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 16, "max_completion_length": 128}
        sizes |= {"num_generations": 8, "target_micro_batch_tokens": 1 << 14, "per_device_eval_batch_size": 256}
    else:
        generator, target = tiny_causal_lm(seed=0), tiny_causal_lm(seed=1)
        tokenizers = [tiny_tokenizer() for _ in range(2)]
        prompts = tiny_prompts(64, 8)
        train, test = list(prompts["train"]), list(prompts["test"])
        sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
    metric = LanguageModelingLikelihood(
        [{"prompt": "", "completion": UUID if device == "cuda" else "good ask blue"}], tokenizers[1]
    )
    args = DatasetPolicyGradientConfig(
        directory,
        learning_rate=3e-4,
        target_learning_rate=1e-5,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **sizes,
        **fields,
    )
    data = [Dataset.from_list(rows) for rows in (train, test)]
    built = DatasetPolicyGradientTrainer(generator, target, metric, args, *data, *tokenizers)
    built.remove_callback(PrinterCallback)
    return built


def step(device: str) -> None:
    """The parts of a training step's time."""
    with tempfile.TemporaryDirectory() as directory:
        built = trainer(device, directory, max_steps=3)
        seconds: dict[str, float] = defaultdict(float)
        with timed(built, "_generate", device, seconds), timed(built, "_calculate_rewards", device, seconds):
            steps: list[dict[str, float]] = []
            built.add_callback(EndOfStep(seconds, steps, device))
            built.train()
        completions = built.args.per_device_train_batch_size * built.args.gradient_accumulation_steps
    print(
        f"{completions} completions of at most {built.args.max_completion_length} tokens a step, {built.credit_assignment} credit.\n"
    )
    print("| step | generation, s | reward, s | update and all else, s | share of the reward |\n|---|---|---|---|---|")
    for number, row in enumerate(steps):
        generation, reward = row["_generate"], row["_calculate_rewards"]
        rest = row["all"] - generation - reward
        print(f"| {number + 1} | {generation:.2f} | {reward:.2f} | {rest:.2f} | {reward / row['all']:.0%} |")


def uuid(device: str, seconds: float) -> None:
    """A whole run, until the time is over, in which SmolLM2 may learn a UUID."""
    with tempfile.TemporaryDirectory() as directory:
        built = trainer(device, directory, max_steps=1000, lr_scheduler_type="constant")
        built.add_callback(StopAfter(seconds))
        before = built.evaluate()
        built.train()
        after = built.evaluate()
    print(f"{built.state.global_step} steps in {seconds:.0f} s, {built.credit_assignment} credit.\n")
    print("| validation | untrained generator | trained generator |\n|---|---|---|")
    for name in sorted(after):
        if name in before and "runtime" not in name and "per_second" not in name:
            print(f"| `{name}` | {before[name]:.5g} | {after[name]:.5g} |")


class EndOfStep(TrainerCallback):
    """Records the seconds of each step, and of its timed parts."""

    def __init__(self, seconds: dict[str, float], steps: list[dict[str, float]], device: str):
        self.seconds, self.steps, self.device = seconds, steps, device

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.steps.append({"all": time.perf_counter() - self.start, **self.seconds})
        self.seconds.clear()


class StopAfter(TrainerCallback):
    """Ends a run after some seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.perf_counter() - self.start > self.seconds


@contextlib.contextmanager
def timed(built: Any, method: str, device: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time that a method of an object takes."""
    original = getattr(built, method)

    def wrapped(*args, **kwargs):
        synchronize(device)
        start = time.perf_counter()
        result = original(*args, **kwargs)
        synchronize(device)
        seconds[method] += time.perf_counter() - start
        return result

    setattr(built, method, wrapped)
    try:
        yield
    finally:
        delattr(built, method)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the tables")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--part", choices=["compiled", "step", "uuid"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is seen; `--device cpu` tries all parts with tiny models")
    if options.part is None:
        sys.exit(0 if run_parts(options.parts, options.device, options.output, options.device == "cuda") else 1)
    print(f"{describe_machine(torch.device(options.device))}\n", flush=True)
    if options.part == "uuid":
        uuid(options.device, options.seconds)
    else:
        {"compiled": compiled, "step": step}[options.part](options.device)


if __name__ == "__main__":
    main()
