"""Examples on their way into a run: what their columns mean is applied or refused by name, never ignored."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .host import double
from .processes import Processes


if TYPE_CHECKING:
    from ..method.recipe import TargetTrainingArguments


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

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        indices, *tensors = self
        return MicroBatch(indices, *(tensor.to(device) for tensor in tensors))  # type: ignore[arg-type, misc]

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
        values = double(values)
        sums = torch.zeros(len(self.indices), dtype=torch.float64, device=values.device)
        return sums.index_add(0, rows.to(values.device), values)


# Models read these beside tokens. The target is given tokens alone.
OTHER_INPUTS = (
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "input_features",
    "image",
    "images",
)
SEGMENTS = ("token_type_ids", "mm_token_type_ids")


def prepare_examples(examples: Sequence[Mapping[str, Any]], max_length: int, vocab_size: int) -> list[Example]:
    """
    Checks examples and cuts them to `max_length` tokens.

    Args:
        examples (`Sequence[Mapping]`):
            Dicts with `input_ids`, optionally `labels` (-100 where not supervised), `weight` and `candidates`. What other columns
            mean is said in `apply_columns`.
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
    recipe: "TargetTrainingArguments",
    size: int | None,
    dtype: torch.dtype,
    processes: Processes,
) -> list[MicroBatch]:
    """
    This process's share of a batch, cut into micro-batches; the normalization is that of the whole batch.

    Args:
        examples (`list[Example]`): All examples.
        batch (`list[int]`): Which of them are in the batch.
        recipe ([`TargetTrainingArguments`]): Its normalization.
        size (`int`, *optional*): Examples in a micro-batch; `None` for all.
        dtype (`torch.dtype`): That of the trained parameters.
        processes ([`Processes`]): Who shares the batch.

    Returns:
        `list[MicroBatch]`: Empty where a process has no example with a supervised token.
    """
    supervised = [i for i in batch if examples[i].num_supervised > 0]
    if recipe.loss_normalization == "batch_tokens":
        tokens = sum(examples[i].num_supervised for i in supervised)
        scales = dict.fromkeys(supervised, 1 / tokens if supervised else 0.0)
    elif recipe.loss_normalization == "example":
        scales = {i: 1 / (examples[i].num_supervised * len(supervised)) for i in supervised}
    else:
        scales = {i: 1 / (recipe.max_length * len(supervised)) for i in supervised}

    start = processes.index * len(supervised) // processes.count
    stop = (processes.index + 1) * len(supervised) // processes.count
    share = supervised[start:stop]
    size = size or max(len(share), 1)
    return [_collate(examples, share[j : j + size], scales, dtype) for j in range(0, len(share), size)]


def _collate(examples: list[Example], indices: list[int], scales: dict[int, float], dtype: torch.dtype) -> MicroBatch:
    rows = [examples[i] for i in indices]
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    length = int(lengths.max())

    def padded(values: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in values])

    return MicroBatch(
        indices,
        padded([row.input_ids for row in rows], 0),
        (torch.arange(length) < lengths[:, None]).long(),
        padded([row.labels for row in rows], -100),
        pad_sequence([row.candidates for row in rows], batch_first=True, padding_value=-1),
        torch.tensor([scales[i] for i in indices], dtype=dtype),
        torch.tensor([examples[i].num_supervised for i in indices]),
        torch.tensor([examples[i].weight for i in indices], dtype=dtype),
        torch.tensor([examples[i].offset for i in indices]),
    )


def apply_columns(
    row: Mapping[str, Any], where: str, input_ids: list[int], labels: list[int] | None
) -> tuple[slice, list[int]]:
    """
    Which tokens of a row are no padding, and the labels of all of its tokens.

    As in [`~trl.SFTTrainer`], `completion_mask` and `assistant_masks` say what is supervised where there are no `labels`.
    Tokens with an `attention_mask` of 0 are padding, and must be at the ends.

    Args:
        row (`Mapping`):
            Columns of the row.
        where (`str`):
            Name of the row in messages.
        input_ids (`list[int]`):
            Its tokens.
        labels (`list[int]`, *optional*):
            Its labels.

    Returns:
        `tuple[slice, list[int]]`: The tokens to keep, and the labels.

    Raises:
        [`ValueError`]: If a column is malformed, or asks for what a run over tokens and labels cannot do.
    """
    if labels is None:
        labels = list(input_ids)
        for key in ("completion_mask", "assistant_masks"):
            if row.get(key) is not None:
                mask = _mask(row[key], where, key, len(input_ids))
                labels = [label if bit else -100 for label, bit in zip(labels, mask, strict=True)]
    kept = slice(0, len(input_ids))
    if row.get("attention_mask") is not None:
        mask = _mask(row["attention_mask"], where, "attention_mask", len(input_ids))
        start = mask.index(1) if 1 in mask else len(mask)
        kept = slice(start, start + sum(mask))
        if 0 in mask[kept]:
            raise ValueError(
                f"{where} has an `attention_mask` with a 0 between ones, at position {start + mask[kept].index(0)}. Padding "
                "is left out at the ends only. Remove the tokens that are not to be seen."
            )
    _check_inputs(row, where, kept)
    return kept, labels


def _mask(values: Any, where: str, key: str, num_tokens: int) -> list[int]:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0, 0)
    if tensor.shape != (num_tokens,) or not ((tensor == 0) | (tensor == 1)).all():
        raise ValueError(
            f"{where} needs `{key}` to be {num_tokens} zeros and ones, one for each of its `input_ids`, got {values!r:.80}. "
            "Make it with the tokens, or leave it out."
        )
    return tensor.long().tolist()


def _check_inputs(row: Mapping[str, Any], where: str, kept: slice) -> None:
    if row.get("seq_lengths") is not None and len(row["seq_lengths"]) > 1:
        raise ValueError(
            f"{where} has `seq_lengths` {row['seq_lengths']!r:.80}: several texts, packed into one row. Here each would see "
            "those before it. Give one example per text (`packing=False`)."
        )
    for key in OTHER_INPUTS:
        if row.get(key) is not None:
            raise ValueError(
                f"{where} has `{key}`, which the target is not given: it is trained on `input_ids` alone. Remove the column, "
                "or use examples of text."
            )
    length = kept.stop - kept.start
    for key in ("position_ids", *SEGMENTS):
        neutral = range(length) if key == "position_ids" else [0] * length
        if row.get(key) is not None and list(row[key])[kept] != list(neutral):
            what = "counts from 0 without a gap" if key == "position_ids" else "is 0 at every token"
            raise ValueError(
                f"{where} has `{key}` {row[key]!r:.80}, which the target is not given. That changes nothing only where it "
                f"{what}. Remove the column, or give one example per text."
            )
