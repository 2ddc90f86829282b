"""The engine against autograd through the whole unrolled run, in float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers.unrolled import unrolled_metagradients
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients


VOCAB = 17


def gpt2(tied=False):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tied,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def make_examples():
    """Ragged, partly unsupervised, one without a supervised token, with weights other than 1."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i in range(6):
        ids = torch.randint(VOCAB, (4 + 2 * (i % 3),), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]] if i % 2 else ids
        examples.append({"input_ids": ids, "labels": labels, "weight": 1.0 + 0.1 * (i - 2)})
    examples[4]["labels"] = [-100] * len(examples[4]["labels"])
    return examples


PROBE = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))


def metric(model):
    logits = model(input_ids=PROBE).logits[:, :-1]
    return -(F.cross_entropy(logits.flatten(0, 1), PROBE[:, 1:].flatten()) ** 2)


ADAMW = {"learning_rate": 1e-2, "adam_epsilon_root": 1e-4, "weight_decay": 0.1, "batch_size": 3, "num_train_epochs": 2}
SGD = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.1, "batch_size": 3, "num_train_epochs": 2}
CASES = {
    "adamw": ADAMW,
    "adamw-k1": {**ADAMW, "batch_size": 6, "num_train_epochs": 1},
    "adamw-k9": {**ADAMW, "batch_size": 2, "num_train_epochs": 3},
    "adamw-uneven": {**ADAMW, "batch_size": 4},
    "adamw-auto": {**ADAMW, "adam_epsilon_root": "auto"},
    "adamw-paper-epsilon": {**ADAMW, "adam_epsilon_root": 1e-9, "learning_rate": 1e-3},
    "adamw-clipped": {**ADAMW, "max_grad_norm": 0.1},
    "adamw-linear": {**ADAMW, "lr_scheduler_type": "linear", "warmup_steps": 2},
    "example": {**ADAMW, "loss_normalization": "example"},
    "max-length": {**ADAMW, "loss_normalization": "max_length", "max_length": 6},
    "adamw-tied": ADAMW,
    "sgd": SGD,
    "sgd-clipped": {**SGD, "max_grad_norm": 0.1},
}


@pytest.mark.parametrize("name", CASES)
def test_engine_agrees_with_unrolled_autograd(name):
    model, examples, args = gpt2(tied="tied" in name), make_examples(), TargetTrainingArguments(**CASES[name])
    expected, metric_after = unrolled_metagradients(model, examples, metric, args)
    out = compute_metagradients(model, examples, metric, args)
    assert out.metric_after == pytest.approx(metric_after, rel=1e-12)
    # The engine computes in float64 here and rounds its result to float32: they may be off by one unit of that.
    torch.testing.assert_close(out.metagradients, expected.float(), rtol=1.2e-7, atol=0.0)
