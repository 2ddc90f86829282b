"""
Prints what exact metagradients of 96 steps of a GPT-2 of 124M parameters take, with the tape on disk.

    python -m benchmarks.long_run > benchmarks/results/long_run.md
"""

import argparse
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers.measure import measured
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadNorm
from trl_dpg.publishing.facts import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--curvature", default="exact")
    parser.add_argument("--tape_dir", default=None)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).to(options.device)
    generator = torch.Generator().manual_seed(0)
    count = options.steps * options.batch_size
    ids = torch.randint(model.config.vocab_size, (count, options.length), generator=generator).tolist()
    args = TargetTrainingArguments(
        batch_size=options.batch_size,
        max_length=options.length,
        tape="disk" if options.device == "cpu" else "host",
        tape_dir=options.tape_dir,
        curvature=options.curvature,
        adam_epsilon_root="auto",
    )
    examples = [{"input_ids": i} for i in ids]
    start = time.perf_counter()
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        out = compute_metagradients(model, examples, LMHeadNorm(), args)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        out, _, peak = measured(lambda: compute_metagradients(model, examples, LMHeadNorm(), args))
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in model.parameters())
    print(f"{describe_machine(torch.device(options.device))}\n")
    print(
        f"GPT-2, {trained / 1e6:.0f}M parameters, all trained (tied head), float32, {options.steps} AdamW steps of "
        f"{options.batch_size} x {options.length} tokens, curvature {options.curvature}: {seconds:.0f} s, tape of "
        f"{out.plan.tape_bytes / 1e9:.1f} GB on {out.plan.tape} ({out.plan.tape_bytes / 4 / trained / options.steps:.3f} times "
        f"the trained parameters a step), peak {peak / 1e9:.1f} GB of memory beyond the model. Metric {out.metric_before:.6f} before, {out.metric_after:.6f} "
        f"after; {int((out.metagradients != 0).sum())} of {count} metagradients are not zero."
    )


if __name__ == "__main__":
    main()
