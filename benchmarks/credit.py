"""
Prints Markdown tables of what credit for every word costs.

    python -m benchmarks.credit --before 37e61d7 > benchmarks/results/credit.md

The first table is about the engine. `--before` is a commit whose engine has no credit of tokens. It runs in a process of its own, in turns
with this one. The second table is about whole training steps of the trainer.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from benchmarks.common import load, make_args, make_examples, with_lora
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metagradients import compute_metagradients
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadPattern


ROOT = Path(__file__).parent.parent
SHAPES = {"gpt2-shaped": (8, 64), "smollm2": (8, 64)}  # examples a step, tokens each


def work(model_name: str) -> None:
    """Answers requests, one JSON object a line, with the seconds of a call."""
    batch_size, length = SHAPES[model_name]
    model = load(model_name, "cpu")
    metric = LanguageModelingLikelihood(make_examples(model_name, 1, 16, skip=4096))
    for line in sys.stdin:
        request = json.loads(line)
        examples = make_examples(model_name, batch_size * request["K"], length)
        if request["candidates"]:
            generator = torch.Generator().manual_seed(0)
            shape = length, request["candidates"]
            examples = [{**e, "candidates": torch.randint(4096, shape, generator=generator)} for e in examples]
        fields = {"batch_size": batch_size, "max_length": length, "adam_epsilon_root": "auto"}
        args = make_args(model_name, request["K"], curvature=request["curvature"], **fields)
        start = time.perf_counter()
        compute_metagradients(model, examples, metric, args)
        print(json.dumps(time.perf_counter() - start), flush=True)


class Worker:
    """A process that computes metagradients by the code in `root`."""

    def __init__(self, root: Path, model_name: str):
        environment = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", model_name]
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )  # fmt: skip

    def seconds(self, **request) -> float:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def engine(before: str, model_name: str, repeats: int) -> None:
    print(
        f"{model_name}, {SHAPES[model_name][0]} x {SHAPES[model_name][1]} tokens a step, float32. Seconds of a call: medians of"
    )
    print(
        f"{8 * repeats} rounds at K = 1, {repeats} at K = 8. Ratios: medians over rounds, in brackets the lowest and the highest.\n"
    )
    print("| K | curvature | without credit, s | credit of tokens | 64 candidates |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        archive = subprocess.run(["git", "archive", before], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
        old, new = Worker(Path(directory), model_name), Worker(ROOT, model_name)
        for num_steps in (1, 8):
            for curvature in ("exact", "central_difference"):
                request = {"K": num_steps, "curvature": curvature}
                rounds = []
                for number in range(repeats * 8 // num_steps + 1):  # as many steps for each K
                    row = [
                        old.seconds(**request, candidates=0),
                        new.seconds(**request, candidates=0),
                        new.seconds(**request, candidates=64),
                    ]
                    if number > 0:  # the first is to warm up
                        rounds.append(row)
                base = statistics.median(row[0] for row in rounds)
                tokens = ratio([row[1] / row[0] for row in rounds])
                candidates = ratio([row[2] / row[1] for row in rounds])
                print(f"| {num_steps} | {curvature} | {base:.3f} | {tokens} | {candidates} |", flush=True)
        for worker in (old, new):
            worker.process.kill()


def ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def random_models(vocabulary: int) -> dict:
    """GPT-2s of 2 layers and width 64."""
    # not at the top: a worker's commit may have neither this module nor the one below
    from trl_dpg.testing import ONE_SPECIAL_TOKEN, tiny_causal_lm, tiny_prompts, tiny_tokenizer

    models = [tiny_causal_lm(vocabulary, seed=seed, special_tokens=ONE_SPECIAL_TOKEN) for seed in (0, 1)]
    tokenizers = [tiny_tokenizer(vocabulary - 1, ONE_SPECIAL_TOKEN) for _ in models]
    return {
        "models": models,
        "tokenizers": tokenizers,
        "prompts": tiny_prompts(4096, 4)["train"],
        "metric": LMHeadPattern.sixty_seven(scale="auto"),
    }


def pretrained_models() -> dict:
    """SmolLM2-135M-Instruct as generator and as target, with LoRA of rank 8 on both."""
    from experiments.corpora import smollm2, wikipedia_leads

    return {
        "models": [with_lora(load("smollm2", "cpu")) for _ in range(2)],
        "tokenizers": [AutoTokenizer.from_pretrained(smollm2()) for _ in range(2)],
        "prompts": Dataset.from_dict({"prompt": [text[:60] for text in wikipedia_leads()["text"][:256]]}),
        "metric": LanguageModelingLikelihood(make_examples("smollm2", 4, 32, skip=256)),
    }


# words of random models or pretrained ones, completions a step, candidates
STEPS = [(64, 512, None), (2048, 128, None), (2048, 128, 64), (8192, 128, 64), ("smollm2", 16, 64)]


def trainer(repeats: int, only: list[str]) -> None:
    """Seconds of training steps, generation and update included."""
    print(
        "\nWhole training steps: random GPT-2s of 2 layers and width 64 as generator and target, or SmolLM2-135M with LoRA as"
    )
    print("both. 24 tokens a completion, K = 1. Medians, and ratios to credit of whole completions.\n")
    print("| words | completions a step | candidates | sequence, s | token | expected |\n|---|---|---|---|---|---|")
    for vocabulary, completions, candidates in STEPS:
        if only and str(vocabulary) not in only:
            continue
        parts = pretrained_models() if vocabulary == "smollm2" else random_models(vocabulary)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as directory:
            trainers = {}
            for assignment in ("sequence", "token", "expected"):
                args = DatasetPolicyGradientConfig(
                    directory, credit_assignment=assignment, credit_candidates=candidates, per_device_train_batch_size=completions,
                    num_generations=4, max_completion_length=24, learning_rate=1e-5, gradient_checkpointing=False, bf16=False,
                    use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                )  # fmt: skip
                trainers[assignment] = DatasetPolicyGradientTrainer(
                    copy.deepcopy(parts["models"][0]), parts["models"][1], parts["metric"], args, parts["prompts"], None, *parts["tokenizers"]
                )  # fmt: skip
                trainers[assignment].model.train()
            rounds = []
            data = {name: iter(each.get_train_dataloader()) for name, each in trainers.items()}
            for number in range(repeats + 1):
                row = {}
                for name, each in trainers.items():
                    each.current_gradient_accumulation_steps = 1
                    start = time.perf_counter()
                    each.training_step(each.model, next(data[name]), None)
                    row[name] = time.perf_counter() - start
                    each.model.zero_grad()
                if number > 0:  # the first is to warm up
                    rounds.append(row)
        base = statistics.median(row["sequence"] for row in rounds)
        token, expected = (ratio([row[name] / row["sequence"] for row in rounds]) for name in ("token", "expected"))
        cells = [vocabulary, completions, candidates or "all", f"{base:.3f}", token, expected]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="a commit without credit of tokens")
    parser.add_argument("--models", nargs="*", default=["gpt2-shaped"], help=", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", nargs="*", default=[], help="only these rows of the second table, by their first column"
    )
    parser.add_argument("--worker", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    from trl_dpg.publishing.facts import describe_machine  # which the engine of `--before` may not have

    print(f"{describe_machine(torch.device('cpu'))}\n")
    for name in options.models if options.before else []:
        engine(options.before, name, options.repeats)
    trainer(options.repeats, options.steps)


if __name__ == "__main__":
    main()
