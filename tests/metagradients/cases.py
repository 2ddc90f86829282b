"""Problems that many tests take up: models, recipes and data, small enough for float64 finite differences."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


VOCAB = 17


def gpt2(tied=False):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1, attn_pdrop=0.1,
        tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def rope_model(config_class, model_class):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return model_class(config).double()


def lora(model):
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():  # off the point where B = 0
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    return model


def make_examples(n=6, seed=2):
    """Ragged examples, partly unsupervised, with weights other than 1."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(n):
        length = 4 + 2 * (i % 3)
        ids = torch.randint(VOCAB, (length,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]] if i % 2 else list(ids)
        examples.append({"input_ids": ids, "labels": labels, "weight": 1.0 + 0.1 * (i - 2)})
    return examples


PROBE = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))


def metric(model):
    """A metric with curvature that every parameter enters."""
    logits = model(input_ids=PROBE).logits[:, :-1].double()  # transformers' own loss would round to float32
    return -(F.cross_entropy(logits.flatten(0, 1), PROBE[:, 1:].flatten()) ** 2)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


ADAMW = {"optim": "adamw", "learning_rate": 1e-2, "adam_epsilon_root": 1e-4, "weight_decay": 0.1}
SGD = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}
MUON = {**ADAMW, "optim": "muon"}
K1 = {"batch_size": 6}
K4 = {"batch_size": 3, "num_train_epochs": 2}
CASES = {
    "adamw-k1": (gpt2, {**ADAMW, **K1}),
    "adamw-k4": (gpt2, {**ADAMW, **K4}),
    "adamw-k4-paper-eps": (gpt2, {**ADAMW, **K4, "adam_epsilon_root": 1e-9, "learning_rate": 1e-3}),
    "adamw-uneven": (gpt2, {**ADAMW, "batch_size": 4}),
    "adamw-k9": (gpt2, {**ADAMW, "batch_size": 2, "num_train_epochs": 3}),
    "sgd-k1": (gpt2, {**SGD, **K1}),
    "sgd-k4": (gpt2, {**SGD, **K4}),
    "tied-adamw-k1": (lambda: gpt2(tied=True), {**ADAMW, **K1}),
    "tied-adamw-k4": (lambda: gpt2(tied=True), {**ADAMW, **K4}),
    "tied-sgd-k4": (lambda: gpt2(tied=True), {**SGD, **K4}),
    "example": (gpt2, {**ADAMW, **K4, "loss_normalization": "example"}),
    "max-length": (gpt2, {**ADAMW, **K4, "loss_normalization": "max_length", "max_length": 6}),
    "clipping-adamw": (gpt2, {**ADAMW, **K4, "max_grad_norm": 0.1}),
    "clipping-sgd": (gpt2, {**SGD, **K4, "max_grad_norm": 0.1}),
    "nesterov-k1": (gpt2, {**SGD, **K1, "momentum": 0.9, "nesterov": True}),
    "momentum-k4": (gpt2, {**SGD, **K4, "momentum": 0.9}),
    "nesterov-k4": (gpt2, {**SGD, **K4, "momentum": 0.9, "nesterov": True, "max_grad_norm": 0.1}),
    "muon-k1": (gpt2, {**MUON, **K1}),
    "muon-k4": (gpt2, {**MUON, **K4}),
    "muon-clipped": (
        lambda: gpt2(tied=True),
        {**MUON, **K4, "momentum": 0.5, "nesterov": False, "max_grad_norm": 0.1},
    ),
    "muon-lora": (lambda: lora(gpt2()), {**MUON, **K4}),
    "linear-warmup": (gpt2, {**ADAMW, **K4, "lr_scheduler_type": "linear", "warmup_steps": 2}),
    "cosine-warmup": (gpt2, {**ADAMW, **K4, "lr_scheduler_type": "cosine", "warmup_steps": 0.5}),
    "no-decay-on-norms": (gpt2, {**ADAMW, **K4, "weight_decay_on_norm_and_bias": False}),
    "micro-batches": (gpt2, {**ADAMW, **K4, "micro_batch_size": 2}),
    "lora-adamw": (lambda: lora(gpt2()), {**ADAMW, **K4}),
    "lora-sgd": (lambda: lora(gpt2(tied=True)), {**SGD, **K4}),
}
