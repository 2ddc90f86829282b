"""Preparation of examples. A column that would change the training is applied, or refused by name, but never ignored."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .host import double
from .processes import Processes


if TYPE_CHECKING:
    from ..method.recipe import TargetTrainingArguments


# Inputs of models other than tokens. The target gets tokens alone.
OTHER_INPUTS = (
    *("inputs_embeds", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"),
    *("input_features", "image", "images"),
)


MOST_PADDING = 0.1  # largest share of padding in a micro-batch
BUSY_TOKENS = {"cpu": 1 << 10, "cuda": 1 << 14}  # a forward pass over fewer tokens takes hardly less time


class Example(NamedTuple):
    """One training example, cut to `max_length`. `labels[j]` is predicted from the tokens before `j`."""

    input_ids: list[int]
    labels: list[int]
    num_supervised: int  # number of supervised tokens; the first token has no context and is never one
    weight: float
    candidates: Tensor  # (tokens, k) tokens that could stand at each position, -1 for none; k is that of all examples
    num_candidates: int  # k of this example, before padding to that of all examples
    start: int  # number of padding tokens that were cut off at the start
    offset: int  # number of tokens in all examples before this one


class MicroBatch(NamedTuple):
    """
    Right-padded examples of one forward pass. It has `b` examples of `l` tokens, `t` supervised tokens in all, and `k` candidates for
    each. Tensors of tokens may have more than `b` rows. Rows beyond the examples have no labels.
    """

    indices: list[int]  # positions in the list of all examples
    input_ids: Tensor  # (b, l)
    attention_mask: Tensor  # (b, l)
    labels: Tensor  # (b, l)
    candidates: Tensor  # (b, l, k) -1 for none
    inverse_z: Tensor  # (b,) 1 / Z_t, the factor of an example's summed cross-entropy
    num_supervised: Tensor  # (b,)
    weights: Tensor  # (b,) w_i
    offsets: Tensor  # (b,) number of tokens in all examples before this one

    def first(self, n: int) -> "MicroBatch":
        """The first `n` examples."""
        return MicroBatch(*(column[:n] for column in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "MicroBatch":
        """The micro-batch on a device."""
        indices, *tensors = self
        return MicroBatch(indices, *(tensor.to(device) for tensor in tensors))  # type: ignore[arg-type, misc]

    def supervised(self) -> tuple[Tensor, Tensor]:
        """Row of each supervised token, and position of the token before it, whose logits predict it. Shape `(t,)` each."""
        rows, columns = (self.labels[:, 1:] != -100).nonzero(as_tuple=True)
        return rows, columns

    def token_indices(self) -> Tensor:
        """Index of each supervised token in the concatenated tokens of all examples, shape `(t,)`."""
        rows, columns = self.supervised()
        return self.offsets[rows] + columns + 1

    def token_weights(self, candidates: bool = False) -> Tensor:
        """A weight for each loss that [`TokenLosses`] returns: the weight of its example, or 0 for a candidate."""
        rows, _ = self.supervised()
        return F.pad(self.weights[rows, None], (0, self.candidates.shape[2] if candidates else 0))

    def nats_per_loss(self) -> Tensor:
        """Factors that turn losses of examples into nats per supervised token, in float64, shape `(b,)`."""
        return 1 / double(self.inverse_z * self.num_supervised)

    def example_sums(self, values: Tensor) -> Tensor:
        """Sums over the tokens of each example, in float64: `(t,)` in, `(b,)` out."""
        rows, _ = self.supervised()
        values = double(values)
        sums = torch.zeros(len(self.indices), dtype=torch.float64, device=values.device)
        return sums.index_add(0, rows.to(values.device), values)


def prepare_examples(examples: Sequence[Mapping[str, Any]], max_length: int, vocab_size: int) -> list[Example]:
    """
    Checks examples, and cuts them to `max_length` tokens.

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
        prepared.append(_prepared(example, f"`examples[{i}]`", max_length, vocab_size)._replace(offset=offset))
        offset += len(prepared[-1].input_ids)
    width = max(example.num_candidates for example in prepared)
    return [e._replace(candidates=F.pad(e.candidates, (0, width - e.num_candidates), value=-1)) for e in prepared]


def _prepared(row: Mapping[str, Any], where: str, max_length: int, vocab_size: int) -> Example:
    if "input_ids" not in row:
        raise ValueError(
            f"{where} has the keys {sorted(row)} but no `input_ids`. Tokenize the text first, for example with "
            "`tokenizer(text)`."
        )
    read = partial(_read, row, where)
    must = "a flat list of token ids", "one example per dict, tokenized"
    ids = read("input_ids", _whole_numbers, lambda t: t.ndim == 1, *must)
    num, labels, weight, candidates = len(ids), None, 1.0, torch.empty(len(ids), 0, dtype=torch.long)
    # A `datasets.Dataset` fills missing fields with None.
    if row.get("labels") is not None:
        must = f"a flat list of {num} token ids", "one for each of its `input_ids`, -100 where it is not supervised"
        labels = read("labels", _whole_numbers, lambda t: t.shape == (num,), *must).tolist()
    if row.get("weight") is not None:
        weight = read("weight", float, math.isfinite, "a finite number", "1.0, or leave it out")
    if row.get("candidates") is not None:
        must = f"token ids of shape ({num}, k)", "k for each of its `input_ids`, -1 for none"
        candidates = read("candidates", _whole_numbers, lambda t: t.ndim == 2 and len(t) == num, *must)
    kept, labels = apply_columns(row, where, ids.tolist(), labels)
    width = candidates.shape[1]
    ids, candidates, target = ids[kept], candidates[kept], torch.tensor(labels, dtype=torch.long)[kept]
    for key, column, none in (("input_ids", ids, 0), ("labels", target, -100), ("candidates", candidates, -1)):
        outside = column[((column < 0) | (column >= vocab_size)) & (column != none)]
        if len(outside) > 0:
            others = f", or {none} for none" if none else ""
            raise ValueError(
                f"{where} holds token {outside[0]} in `{key}`, outside the target's vocabulary of {vocab_size}. Give tokens of the "
                f"target model's own tokenizer (`target_processing_class` in the trainer){others}."
            )
    input_ids, labels = ids[:max_length].tolist(), target[:max_length].tolist()
    num_supervised = len(labels[1:]) - labels[1:].count(-100)
    return Example(input_ids, labels, num_supervised, weight, candidates[:max_length], width, kept.start, 0)


def _read(row, where: str, key: str, convert: Callable, suits: Callable[[Any], bool], must: str, give: str) -> Any:
    """Reads a column of a row, converted by `convert`. Raises a [`ValueError`] unless `suits` accepts it."""
    try:
        values = convert(row[key])
        if suits(values):
            return values
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"{where} needs `{key}` to be {must}, got {row[key]!r:.80}. Give {give}.")


def _whole_numbers(values: Any) -> Tensor:
    tensor = torch.as_tensor(values, device="cpu")
    if tensor.numel() > 0 and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError
    return tensor.long()


def apply_columns(
    row: Mapping[str, Any], where: str, input_ids: list[int], labels: list[int] | None
) -> tuple[slice, list[int]]:
    """
    Applies the columns of a row: finds the tokens that are not padding, and the labels of all tokens. Messages call the row `where`.

    Without `labels`, `completion_mask` and `assistant_masks` say which tokens are supervised, as in [`~trl.SFTTrainer`].
    Tokens with an `attention_mask` of 0 are padding, and must be at the ends.

    Raises:
        [`ValueError`]: If a column is malformed, or would need more than tokens and labels.
    """
    num = len(input_ids)

    def mask(key: str) -> list[int]:
        if row.get(key) is None:
            return [1] * num
        suits = lambda t: t.shape == (num,) and bool(((t == 0) | (t == 1)).all())  # noqa: E731
        must = f"{num} zeros and ones", "one for each of its `input_ids`, or leave it out"
        return _read(row, where, key, torch.as_tensor, suits, *must).long().tolist()

    if labels is None:
        supervised = zip(input_ids, mask("completion_mask"), mask("assistant_masks"), strict=True)
        labels = [token if completion and assistant else -100 for token, completion, assistant in supervised]
    seen = mask("attention_mask")
    start = seen.index(1) if 1 in seen else num
    kept = slice(start, start + sum(seen))
    if 0 in seen[kept]:
        raise ValueError(
            f"{where} has an `attention_mask` with a 0 between ones, at position {start + seen[kept].index(0)}. Padding may stand "
            "at the ends only. Remove the tokens that the model should not see."
        )
    _check_inputs(row, where, kept)
    return kept, labels


def _check_inputs(row: Mapping[str, Any], where: str, kept: slice) -> None:
    if row.get("seq_lengths") is not None and len(row["seq_lengths"]) > 1:
        raise ValueError(
            f"{where} has `seq_lengths` {row['seq_lengths']!r:.80}: several texts, packed into one row. Each text would see "
            "those before it. Give one example per text (`packing=False`)."
        )
    for key in OTHER_INPUTS:
        if row.get(key) is not None:
            raise ValueError(
                f"{where} has `{key}`, but the target does not get this input: it is trained on `input_ids` alone. Remove the "
                "column, or use examples of text."
            )
    length = kept.stop - kept.start
    harmless = {"position_ids": list(range(length)), "token_type_ids": [0] * length, "mm_token_type_ids": [0] * length}
    for key, values in harmless.items():
        if row.get(key) is not None and list(row[key])[kept] != values:
            raise ValueError(
                f"{where} has `{key}` {row[key]!r:.80}, but the target does not get this input. Only {values!r:.40} would make no "
                "difference. Remove the column, or give one example per text."
            )


def micro_batches(
    examples: list[Example],
    batch: list[int],
    recipe: "TargetTrainingArguments",
    size: int | None,
    like: Tensor,
    processes: Processes,
) -> list[MicroBatch]:
    """
    Splits this process's share of a batch into micro-batches of at most `size` examples (`None` for all), on the host.

    Examples are sorted by length, the longest first, and dealt out to the processes in turn. A micro-batch has at most
    `micro_batch_tokens` tokens, padding included. Once it has enough tokens to keep the device of `like` busy, it ends where padding
    would take more than a tenth of them. Floating-point columns have the dtype of `like`.

    Losses are normalized over the whole batch. A process whose share has no supervised token gets no micro-batch. If the processes
    share one model (`processes.in_step`), they must call it alike: all get the same number of rows, some of them without labels.
    """
    supervised = [i for i in batch if examples[i].num_supervised > 0]
    supervised.sort(key=lambda i: len(examples[i].input_ids), reverse=True)
    tokens = torch.tensor([examples[i].num_supervised for i in supervised], dtype=torch.float64)
    norms = {
        "batch_tokens": tokens.sum().expand(len(tokens)),
        "example": tokens * len(tokens),
        "max_length": torch.full_like(tokens, recipe.max_length * len(tokens)),
    }
    inverses = dict(zip(supervised, (1 / norms[recipe.loss_normalization]).tolist(), strict=True))
    lengths = [len(examples[i].input_ids) for i in supervised[:: processes.count]]  # no process has longer ones
    share = supervised[processes.index :: processes.count]
    parts = _parts(lengths, size, recipe.micro_batch_tokens, BUSY_TOKENS.get(like.device.type, BUSY_TOKENS["cuda"]))
    rows = [(share[part], max(part.stop - part.start, 1) if processes.in_step else len(share[part])) for part in parts]
    return [_collate(examples, indices, num_rows, inverses, like.dtype) for indices, num_rows in rows if num_rows > 0]


def _parts(lengths: list[int], size: int | None, tokens: int | None, busy: int) -> Iterator[slice]:
    """Slices of the examples, sorted from long to short. Each slice makes a micro-batch."""
    start = real = 0
    for stop, length in enumerate(lengths):
        rows = stop - start + 1
        padded, real = rows * lengths[start], real + length
        wasteful = padded > busy and real < (1 - MOST_PADDING) * padded
        if stop > start and (rows > (size or rows) or padded > (tokens or padded) or wasteful):
            yield slice(start, stop)
            start, real = stop, length
    yield slice(start, len(lengths))


def _collate(
    examples: list[Example], indices: list[int], num_rows: int, inverses: dict[int, float], dtype: torch.dtype
) -> MicroBatch:
    no_candidates = torch.full((2, examples[0].candidates.shape[1]), -1)
    none = examples[0]._replace(input_ids=[0, 0], labels=[-100, -100], candidates=no_candidates)
    rows = [examples[i] for i in indices] + [none] * (num_rows - len(indices))
    ids, labels = ([torch.tensor(row[column]) for row in rows] for column in range(2))
    return MicroBatch(
        indices,
        pad_sequence(ids, batch_first=True),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
        pad_sequence([row.candidates for row in rows], batch_first=True, padding_value=-1),
        torch.tensor([inverses[i] for i in indices], dtype=dtype),
        torch.tensor([examples[i].num_supervised for i in indices]),
        torch.tensor([examples[i].weight for i in indices], dtype=dtype),
        torch.tensor([examples[i].offset for i in indices], dtype=torch.long),
    )
