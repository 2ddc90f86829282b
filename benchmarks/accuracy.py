"""
Prints Markdown tables of two errors: that of float64 metagradients against finite differences of the whole training run, and that of
float32 metagradients against float64 ones.

    python -m benchmarks.accuracy > benchmarks/results/accuracy.md
"""

import platform
from itertools import product

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.metagradients.test_finite_differences import (
    CASES,
    compute_metagradients,
    finite_differences,
    make_examples,
    metric,
    relative_error,
)
from trl_dpg.metagradients import TargetTrainingArguments


def main() -> None:
    print(
        f"torch {torch.__version__}, {platform.machine()}, CPU. Relative error: norm of the difference over the norm.\n"
    )
    print(
        "Float64 against fourth-order central differences of the whole training run. Tiny random GPT-2, ragged and partly"
    )
    print("unsupervised examples.\n")
    print("| case | error |\n|---|---|")
    for name, (make_model, fields) in CASES.items():
        model, examples, args = make_model(), make_examples(), TargetTrainingArguments(**fields)
        out = compute_metagradients(model, examples, metric, args)
        print(f"| {name} | {relative_error(out.metagradients, finite_differences(model, examples, args)):.1e} |")

    print(
        "\nFloat32 against float64, one column per seed of a random GPT-2. The smaller `epsilon_root` beside the squared"
    )
    print("gradients, the worse conditioned; a wide initialization and few examples make gradients large.\n")
    print("| model and data | epsilon_root | K | " + " | ".join(f"seed {seed}" for seed in range(3)) + " |")
    print("|---" * 6 + "|")
    for label, width, spread, num_examples in (
        ("width 32, init 0.02, 64 examples", 32, 0.02, 64),
        ("width 32, init 0.02, 16 examples", 32, 0.02, 16),
        ("width 8, init 0.3, 16 examples", 8, 0.3, 16),
    ):
        for tied, epsilon_root, steps in product((False, True), (1e-9, 1e-6, "auto"), (1, 4)):
            errors = [float32_error(width, spread, num_examples, tied, epsilon_root, steps, seed) for seed in range(3)]
            name = f"{label}, {'tied' if tied else 'untied'}"
            print(f"| {name} | {epsilon_root} | {steps} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")


def float32_error(width, spread, num_examples, tied, epsilon_root, steps, seed) -> float:
    generator = torch.Generator().manual_seed(5)
    examples = [{"input_ids": torch.randint(64, (16,), generator=generator).tolist()} for _ in range(num_examples)]
    args = TargetTrainingArguments(
        batch_size=num_examples // steps, learning_rate=1e-3, adam_epsilon_root=epsilon_root
    )
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=width, n_layer=2, n_head=2, tie_word_embeddings=tied,
        initializer_range=spread, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    single = compute_metagradients(model, examples, metric, args)
    double = compute_metagradients(model.double(), examples, metric, args)
    return relative_error(single.metagradients, double.metagradients.double())


if __name__ == "__main__":
    main()
