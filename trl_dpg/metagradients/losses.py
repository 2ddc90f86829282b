"""The training loss of one batch: examples in, losses of tokens out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .arguments import TargetTrainingArguments
from .columns import apply_columns
from .model import TargetModel, vocab_size
from .vocabulary import LOGITS_AT_ONCE, decoder_and_head, has_plain_head, token_losses


class Example(NamedTuple):
    """One training example, cut to `max_length`. `labels[j]` is predicted from the tokens before `j`."""

    input_ids: list[int]
    labels: list[int]
    num_supervised: int  # the first token is never one, as nothing precedes it
    weight: float
    candidates: (
        Tensor  # (tokens, k) other tokens that could stand at each position, -1 for none; k is that of all examples
    )
    num_candidates: int  # its own k
    start: int  # how many tokens of padding were before it
    offset: int  # tokens of all examples before this one


class MicroBatch(NamedTuple):
    """Examples of one forward pass, right-padded: `b` examples, `l` tokens, `t` of them supervised, `k` candidates each."""

    indices: list[int]  # positions in the list of all examples
    input_ids: Tensor  # (b, l)
    attention_mask: Tensor  # (b, l)
    labels: Tensor  # (b, l)
    candidates: Tensor  # (b, l, k) -1 for none
    scale: Tensor  # (b,) what an example's summed cross-entropy is multiplied by, Z_t included
    num_supervised: Tensor  # (b,)
    weights: Tensor  # (b,) w_i
    offsets: Tensor  # (b,) tokens of all examples before this one

    def first(self, n: int) -> "MicroBatch":
        """The first `n` examples."""
        indices, *tensors = self
        return MicroBatch(indices[:n], *(tensor[:n] for tensor in tensors))  # type: ignore[arg-type, misc]

    def supervised(self) -> tuple[Tensor, Tensor]:
        """Row of each supervised token, and the position before it, whose logits predict it. Shape `(t,)` each."""
        rows, columns = (self.labels[:, 1:] != -100).nonzero(as_tuple=True)
        return rows, columns

    def places(self) -> Tensor:
        """Where each supervised token stands among the tokens of all examples, shape `(t,)`."""
        rows, columns = self.supervised()
        return self.offsets[rows] + columns + 1

    def token_weights(self, candidates: bool = False) -> Tensor:
        """Weights of what [`TokenLosses`] returns, of its shape: those of the examples, and 0 for candidates."""
        rows, _ = self.supervised()
        return F.pad(self.weights[rows, None], (0, self.candidates.shape[2] if candidates else 0))

    def example_sums(self, values: Tensor) -> Tensor:
        """Sums over the tokens of each example, in float64: `(t,)` in, `(b,)` out."""
        rows, _ = self.supervised()
        sums = torch.zeros(len(self.indices), dtype=torch.float64, device=values.device)
        return sums.index_add(0, rows, values.double())


def prepare_examples(examples: Sequence[Mapping[str, Any]], max_length: int, vocab_size: int) -> list[Example]:
    """
    Checks examples and cuts them to `max_length` tokens.

    Args:
        examples (`Sequence[Mapping]`):
            Dicts with `input_ids`, optionally `labels` (-100 where not supervised), `weight` and `candidates`. What other columns
            mean is said in [`~trl_dpg.metagradients.columns.apply_columns`].
        max_length (`int`):
            Tokens kept of each example.
        vocab_size (`int`):
            Rows of the target's input embedding.

    Raises:
        [`ValueError`]: If there are no examples, or one of them is malformed.
    """
    if len(examples) == 0:
        raise ValueError("`examples` is empty: there is nothing to fine-tune the target model on. Pass at least one.")
    prepared: list[Example] = []
    offset = 0
    for i, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise ValueError(
                f"`examples` must be a sequence of dicts with `input_ids`, but item {i} is of type "
                f"{type(example).__name__}. Write `[{{'input_ids': ids}} for ids in ...]`."
            )
        if "input_ids" not in example:
            raise ValueError(
                f"`examples[{i}]` has the keys {sorted(example)} but no `input_ids`. Tokenize the text first, for example "
                "with `tokenizer(text)`."
            )
        input_ids = _token_ids(example["input_ids"], i, "input_ids")
        # a `datasets.Dataset` fills up missing fields with None
        labels = None if example.get("labels") is None else _token_ids(example["labels"], i, "labels")
        weight = 1.0 if example.get("weight") is None else _weight(example["weight"], i)
        if labels is not None and len(labels) != len(input_ids):
            raise ValueError(
                f"`examples[{i}]['labels']` has {len(labels)} entries for {len(input_ids)} `input_ids`. Give one label per "
                "token, -100 where it is not supervised."
            )
        kept, labels = apply_columns(example, f"`examples[{i}]`", input_ids, labels)
        candidates = _candidates(example.get("candidates"), i, len(input_ids), vocab_size)
        input_ids, labels = input_ids[kept], labels[kept]
        outside = [token for token in input_ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"`examples[{i}]['input_ids']` holds token {outside[0]}, outside the target's vocabulary of "
                f"{vocab_size}. Tokenize the examples with the target model's own tokenizer (`target_processing_class` in the "
                "trainer)."
            )
        outside = [label for label in labels if label != -100 and not 0 <= label < vocab_size]
        if outside:
            raise ValueError(
                f"`examples[{i}]['labels']` holds {outside[0]}. Give token ids below {vocab_size}, or -100 where not "
                "supervised."
            )
        candidates, width = candidates[kept][:max_length], candidates.shape[1]
        input_ids, labels = input_ids[:max_length], labels[:max_length]
        num_supervised = len(labels[1:]) - labels[1:].count(-100)
        prepared.append(Example(input_ids, labels, num_supervised, weight, candidates, width, kept.start, offset))
        offset += len(candidates)
    width = max(example.num_candidates for example in prepared)
    if all(example.num_candidates == width for example in prepared):
        return prepared
    return [e._replace(candidates=F.pad(e.candidates, (0, width - e.num_candidates), value=-1)) for e in prepared]


def _candidates(values: Any, i: int, num_tokens: int, vocab_size: int) -> Tensor:
    if values is None:
        return torch.empty(num_tokens, 0, dtype=torch.long)
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0)
    if tensor.ndim != 2 or len(tensor) != num_tokens or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"`examples[{i}]['candidates']` must hold token ids of shape ({num_tokens}, k): k for each of the {num_tokens} "
            f"`input_ids`, -1 for none. Got {values!r:.80}."
        )
    tensor = tensor.long()
    if tensor.numel() > 0 and not -1 <= tensor.min() <= tensor.max() < vocab_size:
        raise ValueError(
            f"`examples[{i}]['candidates']` holds {tensor.min()} to {tensor.max()}. Give token ids below {vocab_size}, or -1 "
            "for none."
        )
    return tensor


def _token_ids(values: Any, i: int, key: str) -> list[int]:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if tensor is None or tensor.ndim != 1 or (len(tensor) > 0 and tensor.dtype not in integers):
        raise ValueError(
            f"`examples[{i}]['{key}']` must be a flat list of token ids, got {values!r:.80}. Give one example per dict, "
            "tokenized."
        )
    return tensor.tolist()


def _weight(value: Any, i: int) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError, RuntimeError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"`examples[{i}]['weight']` must be a finite number, got {value!r}. Leave it out for 1.0.")
    return weight


def micro_batches(
    examples: list[Example],
    batch: list[int],
    args: TargetTrainingArguments,
    device: torch.device,
    dtype: torch.dtype,
    process_index: int = 0,
    num_processes: int = 1,
) -> list[MicroBatch]:
    """
    This process's share of a batch, cut into micro-batches; the normalization is that of the whole batch.

    The list is empty where a process has no example with a supervised token.
    """
    supervised = [i for i in batch if examples[i].num_supervised > 0]
    if args.loss_normalization == "batch_tokens":
        tokens = sum(examples[i].num_supervised for i in supervised)
        scales = dict.fromkeys(supervised, 1 / tokens if supervised else 0.0)
    elif args.loss_normalization == "example":
        scales = {i: 1 / (examples[i].num_supervised * len(supervised)) for i in supervised}
    else:
        scales = {i: 1 / (args.max_length * len(supervised)) for i in supervised}

    start = process_index * len(supervised) // num_processes
    stop = (process_index + 1) * len(supervised) // num_processes
    share = supervised[start:stop]
    size = args.micro_batch_size or max(len(share), 1)
    return [_collate(examples, share[j : j + size], scales, device, dtype) for j in range(0, len(share), size)]


def _collate(examples, indices, scales, device, dtype) -> MicroBatch:
    rows = [examples[i] for i in indices]
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    length = int(lengths.max())

    def padded(values: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in values], device=device)

    return MicroBatch(
        indices,
        padded([row.input_ids for row in rows], 0),
        (torch.arange(length) < lengths[:, None]).long().to(device),
        padded([row.labels for row in rows], -100),
        pad_sequence([row.candidates for row in rows], batch_first=True, padding_value=-1).to(device),
        torch.tensor([scales[i] for i in indices], dtype=dtype, device=device),
        torch.tensor([examples[i].num_supervised for i in indices], device=device),
        torch.tensor([examples[i].weight for i in indices], dtype=dtype, device=device),
        torch.tensor([examples[i].offset for i in indices], device=device),
    )


class TokenLosses(nn.Module):
    r"""
    Losses of a micro-batch's supervised tokens, \\( \ell_{ij}(\phi) / Z_t \\), as a function of it: shape `(t, 1)`.

    Weighted by \\( w_i \\) and summed over a batch, they are \\( L_t(\phi; w) \\). With `candidates`, the shape is `(t, 1 + k)`: behind
    a token's own loss stand those of its candidates, \\( -\log p(v \mid x_{<j}) / Z_t \\), 0 where there is none.

    Logits are computed chunk by chunk where the model allows it (see [`~trl_dpg.metagradients.vocabulary.has_plain_head`]) and
    there are many. `num_tokens` decides as that many tokens would. Behind a base in half precision a plain head always
    computes in the precision of what is trained, so that the size of micro-batches does not change the rounding.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, in the state (evaluation mode, attention implementation) in which it will be run.
        bf16 (`bool`):
            Whether it runs under bfloat16 autocast.
    """

    def __init__(self, model: TargetModel, bf16: bool):
        super().__init__()
        self.model = model
        self.bf16 = bf16
        self._plain_head: bool | None = None  # not known yet

    def forward(self, batch: MicroBatch, candidates: bool = False, num_tokens: int | None = None) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        targets = batch.labels[:, 1:, None]
        if candidates and batch.candidates.shape[2] > 0:
            targets = torch.cat([targets, batch.candidates[:, 1:]], dim=2)
        rows, columns = batch.supervised()
        if self._by_chunks(num_tokens or targets[..., 0].numel()):
            decoder, head = decoder_and_head(self.model)
            hidden = decoder(**inputs).last_hidden_state[:, :-1]
            targets = targets[rows, columns]
            # In the precision of what is trained, also behind a frozen part in half precision.
            hidden, weight = hidden[rows, columns].to(batch.scale), head.weight.to(batch.scale)
            losses = token_losses(hidden, weight, targets.clamp(min=0))
        else:
            with torch.autocast(targets.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(**inputs).logits[:, :-1]
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            losses = -F.log_softmax(logits, dim=-1).gather(2, targets.clamp(min=0)).flatten(0, 1)
            targets = targets.flatten(0, 1)
            if len(rows) < len(losses):  # padding, or tokens that are not supervised
                supervised = rows * logits.shape[1] + columns
                losses, targets = losses.index_select(0, supervised), targets.index_select(0, supervised)
        losses = losses * batch.scale[rows, None]
        return losses if targets.shape[1] == 1 else losses.masked_fill(targets < 0, 0.0)

    def _by_chunks(self, num_tokens: int) -> bool:
        if self.bf16:
            return False
        in_half = self.model.get_output_embeddings().weight.dtype in (torch.float16, torch.bfloat16)
        if not in_half and num_tokens * vocab_size(self.model) <= LOGITS_AT_ONCE:
            return False
        if self._plain_head is None:
            self._plain_head = has_plain_head(self.model)
        return self._plain_head
