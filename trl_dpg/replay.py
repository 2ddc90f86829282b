"""Real data beside generated: which rows of it stand in which run of the target."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .data import dataset_examples, indices_to_train_on


HELD_OUT = 5  # every fifth row is for validation alone


def num_replayed(num_generated: int, ratio: float) -> int:
    """Real examples beside this many generated ones, so that they are the share `ratio` of all."""
    return round(num_generated * ratio / (1 - ratio))


def draw(num_rows: int, number: int, seed: int) -> list[int]:
    """Indices of rows, drawn by a seed. No row comes again before all have come."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    passes = [torch.randperm(num_rows, generator=generator) for _ in range(1 + number // num_rows)]
    return torch.cat(passes)[:number].tolist()


def check_ratio(ratio: Any) -> None:
    """Refuses a share that there cannot be."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(
            f"`replay_ratio` must be a number in [0, 1), got {ratio!r}. 0.5 is as many real examples as generated ones."
        )


def check_replay(dataset: Any, ratio: float) -> None:
    """Refuses a share without data, data without a share, and data that the target cannot be trained on."""
    check_ratio(ratio)
    if dataset is None and ratio > 0:
        raise ValueError(
            f"`replay_ratio` is {ratio}, but there is no `replay_dataset`. Pass real data, or leave it at 0."
        )
    if dataset is None:
        return
    if ratio == 0:
        raise ValueError(
            "`replay_dataset` is given, but `replay_ratio` is 0, so none of it would be used. Set the share of real examples, for "
            "example 0.5, or leave out the data."
        )
    if not isinstance(dataset, (Dataset, list)) or len(dataset) < 2:
        what = f"{len(dataset)} rows" if isinstance(dataset, (Dataset, list)) else type(dataset).__name__
        raise ValueError(
            f"`replay_dataset` must be a `datasets.Dataset` or a list of at least two rows, got {what}. One row in "
            f"{HELD_OUT} is kept for validation."
        )
    columns = set(dataset[0])
    if not ("text" in columns or "messages" in columns or {"prompt", "completion"} <= columns):
        raise ValueError(
            f"`replay_dataset` has the columns {sorted(columns)}. It needs `text`, `messages`, or `prompt` and `completion`. "
            "Rename them."
        )


class Replay:
    """
    Real examples, tokenized once. Every fifth row is held out: validation is on those alone, training on the others.

    Args:
        rows (`Dataset` or `list[dict]`):
            Rows with `text`, with `prompt` and `completion`, or with `messages`.
        ratio (`float`):
            Share of real examples among all of a run.
        seed (`int`):
            Seed of the draw in training; the step is added to it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        max_length (`int`):
            Tokens kept of each example. Rows of which no token with a loss is left are refused.
        loss (`Any`):
            `completion_only_loss` and `assistant_only_loss` of [`~trl_dpg.fine_tuning.TargetFineTuning`].

    Raises:
        [`ValueError`]: If a row cannot be trained on.
    """

    def __init__(
        self,
        rows: Dataset | Sequence[dict[str, Any]],
        ratio: float,
        seed: int,
        processing_class: PreTrainedTokenizerBase,
        max_length: int,
        *loss: Any,
    ):
        try:
            examples = dataset_examples(rows, processing_class, *loss)
        except ValueError as error:
            raise ValueError(f"`replay_dataset` cannot be used: {error}") from error
        usable = set(indices_to_train_on([*examples, {"input_ids": [0, 0]}], max_length))
        first = next((i for i in range(len(examples)) if i not in usable), None)
        if first is not None:
            raise ValueError(
                f"`replay_dataset` has nothing to train on in row {first}: {rows[first]!r:.80} has no token with a loss behind the "
                f"first among {max_length} tokens (`max_length`, `target_max_length` in the trainer). Remove such rows, or raise it."
            )
        self.ratio, self.seed = ratio, seed
        self.held_out = examples[::HELD_OUT]
        self.for_training = [example for i, example in enumerate(examples) if i % HELD_OUT]

    def beside(self, num_generated: int, step: int) -> list[dict[str, Any]]:
        """The real examples of a training run on this many generated ones: other ones at every step."""
        number = num_replayed(num_generated, self.ratio)
        return [self.for_training[i] for i in draw(len(self.for_training), number, self.seed + step)]

    def beside_in_validation(self, num_generated: int) -> list[dict[str, Any]]:
        """Those of a validation: held-out ones, the same in every validation of as many examples."""
        number = num_replayed(num_generated, self.ratio)
        return [self.held_out[i] for i in draw(len(self.held_out), number, self.seed)]
