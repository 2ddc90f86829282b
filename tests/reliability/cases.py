"""Inputs drawn by Hypothesis, and metagradients of them by the most direct way: autograd through the whole unrolled run."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_scheduler


SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
POSITIONS = 24


def byte_tokenizer():
    """One token for each byte, so that it can write any text; four special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({token: i for i, token in enumerate([*alphabet, *SPECIAL])}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteDecoder()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER)


def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=4, n_layer=1, n_head=1, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


PROBE = torch.tensor([[5, 60, 7, 200, 5]])


def metric(model):
    """Every parameter enters it, with curvature."""
    logits = model(input_ids=PROBE).logits[:, :-1]
    return -(F.cross_entropy(logits.flatten(0, 1), PROBE[:, 1:].flatten()) ** 2)


# What is drawn

TEXTS = st.one_of(
    st.text(max_size=8),  # any Unicode, the empty text and lone combining characters among it
    st.sampled_from(
        [
            "",
            " ",
            "\n\t ",
            "a",
            "é",
            "\u200b",
            "👩‍👩‍👧",
            "\x00",
            "e\u0301",
            "שלום",
            *SPECIAL,
            "<pad><pad><pad>",
            "a<eos>",
            "<eos>b",
        ]
    ),
    st.text(alphabet="ab ", min_size=POSITIONS, max_size=3 * POSITIONS),  # longer than the model is
)
RECIPES = st.fixed_dictionaries(
    {
        "optim": st.sampled_from(["adamw", "sgd"]),
        "learning_rate": st.sampled_from([1e-3, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "adam_epsilon_root": st.sampled_from(["auto", 1e-3]),
        "lr_scheduler_type": st.sampled_from(["constant", "linear"]),
        "max_grad_norm": st.sampled_from([0.0, 0.05]),
        "num_train_epochs": st.integers(1, 2),
        "batch_size": st.integers(2, 5),
        "micro_batch_size": st.sampled_from([None, 1, 2]),
        "micro_batch_tokens": st.sampled_from([None, 1, 12]),
        "max_length": st.integers(2, 10),
        "seed": st.integers(0, 3),
        "loss_normalization": st.sampled_from(["batch_tokens", "example", "max_length"]),
        "tape": st.sampled_from(["auto", "disk"]),
    }
)
COMPLETIONS = st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=5).flatmap(
    lambda rows: st.sampled_from([rows, rows + rows[:1]])  # with a duplicate, often
)


@st.composite
def drawn_examples(draw):
    """Rows for the engine itself: any tokens, labels and weights, none of which need be of any use."""
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.one_of(st.lists(st.integers(0, VOCAB - 1), max_size=12), st.just([VOCAB - 4] * 3)))
        labels = draw(st.sampled_from(["all", "none", "some"]))
        row = {"input_ids": ids}
        if labels != "all":
            row["labels"] = [token if labels == "some" and i % 2 else -100 for i, token in enumerate(ids)]
        if draw(st.booleans()):
            row["weight"] = draw(st.sampled_from([0.0, 0.5, 2.0, -0.7]))  # which never cancel
        rows.append(row)
    return rows


# What is right


def reference(model, examples, args):
    """Metagradients of `(input_ids, labels, weight)` rows; `None` where `"auto"` has nothing to measure."""
    tokens = reference_of_tokens(model, examples, args)
    return None if tokens is None else torch.stack([row.sum() for row in tokens])


def reference_of_tokens(model, examples, args):
    """The same for each token, of rows that are run through the model alone and without padding."""
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights = [torch.full((len(ids),), w, dtype=torch.float64, requires_grad=True) for ids, _, w in examples]
    cut = [(ids[: args.max_length], labels[: args.max_length]) for ids, labels, _ in examples]
    supervised = [sum(label != -100 for label in labels[1:]) for _, labels in cut]

    order = []
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.num_train_epochs):
        shuffled = torch.randperm(len(examples), generator=generator).tolist()
        order += [shuffled[i : i + args.batch_size] for i in range(0, len(shuffled), args.batch_size)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, 0, len(order))

    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    root = None if args.adam_epsilon_root == "auto" else args.adam_epsilon_root
    for step, batch in enumerate(order, start=1):
        used = [i for i in batch if supervised[i]]
        loss = sum(p.sum() * 0 for p in params.values())
        for i in used:
            ids, labels = (torch.tensor([row]) for row in cut[i])
            logits = functional_call(model, params, kwargs={"input_ids": ids}).logits[:, :-1]
            each = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            total = (weights[i][1 : labels.shape[1]] * each).sum()
            whole = {
                "batch_tokens": sum(supervised[j] for j in used),
                "example": supervised[i] * len(used),
                "max_length": args.max_length * len(used),
            }[args.loss_normalization]
            loss = loss + total / whole
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))
        square = sum((g**2).sum() for g in grads.values())
        if root is None:
            root = 4 * square.item() / sum(p.numel() for p in params.values())
            if root == 0:
                return None
        if args.max_grad_norm and square > 0:
            factor = (args.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
            grads = {name: g * factor for name, g in grads.items()}
        rate = optimizer.param_groups[0]["lr"]
        for name, g in grads.items():
            update = g
            if args.optim == "adamw":
                first[name] = args.adam_beta1 * first[name] + (1 - args.adam_beta1) * g
                second[name] = args.adam_beta2 * second[name] + (1 - args.adam_beta2) * g**2
                numerator = first[name] / (1 - args.adam_beta1**step)
                denominator = (second[name] / (1 - args.adam_beta2**step) + root).sqrt() + args.adam_epsilon
                update = numerator / denominator
            params[name] = params[name] * (1 - rate * args.weight_decay) - rate * update
        scheduler.step()
    grads = torch.autograd.grad(_metric_of(model, params), weights, allow_unused=True)
    return [torch.zeros_like(w) if grad is None else grad for w, grad in zip(weights, grads, strict=True)]


def _metric_of(model, params):
    logits = functional_call(model, params, kwargs={"input_ids": PROBE}).logits[:, :-1]
    return -(F.cross_entropy(logits.flatten(0, 1), PROBE[:, 1:].flatten()) ** 2)


def tokens_of(text, ended):
    """What the target is trained on for a completion, and `[]` where there is nothing."""
    if not text.strip():
        return []
    ids = TOKENIZER.encode(text)
    while ids and ids[-1] == TOKENIZER.eos_token_id:
        del ids[-1]
    return [*ids, TOKENIZER.eos_token_id] if ended else ids


def close(ours, theirs, tolerance=2e-6):
    """Equal to what float32 holds, relative to the largest of them."""
    size = theirs.abs().max().item()
    return len(ours) == len(theirs) and (ours.double() - theirs).abs().max() <= tolerance * size + 1e-12


def standardized(raw):
    """The rewards that the first batch of a reward gets."""
    if len(raw) == 0 or math.isclose(raw.std(correction=0).item(), 0, abs_tol=0):
        return torch.zeros_like(raw)
    return (raw - raw.mean()) / raw.std(correction=0)
