"""Real data that is mixed with generated data: the choice of its rows for each run of the target."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .data import dataset_examples, indices_to_train_on


HELD_OUT = 5  # every fifth row is used in validation only


def num_replayed(num_generated: int, ratio: float) -> int:
    """Number of real examples to add to `num_generated` ones, so that their share of all is `ratio`."""
    return round(num_generated * ratio / (1 - ratio))


def draw(num_rows: int, number: int, seed: int) -> list[int]:
    """Draws `number` indices of rows with a seed. No row is repeated before all have been drawn."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    passes = [torch.randperm(num_rows, generator=generator) for _ in range(1 + number // num_rows)]
    return torch.cat(passes)[:number].tolist()


def check_ratio(ratio: Any) -> None:
    """Raises a [`ValueError`] if the share is no number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(
            f"`replay_ratio` must be a number in [0, 1), got {ratio!r}. 0.5 means as many real examples as generated ones."
        )


def check_replay(dataset: Any, ratio: float) -> None:
    """Raises a [`ValueError`] for a share without data, data without a share, or data that the target cannot be trained on."""
    check_ratio(ratio)
    if dataset is None and ratio > 0:
        raise ValueError(
            f"`replay_ratio` is {ratio}, but there is no `replay_dataset`. Pass real data, or leave `replay_ratio` at 0."
        )
    if dataset is None:
        return
    if ratio == 0:
        raise ValueError(
            "`replay_dataset` is given, but `replay_ratio` is 0, so none of it would be used. Set the share of real examples, for "
            "example 0.5, or leave the data out."
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
            "Rename the columns."
        )


class Replay:
    """
    Real examples, tokenized once. Validation uses every fifth row only, training the other rows only.

    Args:
        rows (`Dataset` or `list[dict]`):
            Rows with `text`, with `prompt` and `completion`, or with `messages`.
        ratio (`float`):
            Share of real examples among all examples of a run.
        seed (`int`):
            Seed of the draw in training. The step is added to it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        max_length (`int`):
            Most tokens of an example. Later ones are cut off. A row without a token with a loss among them is refused.
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
                f"`replay_dataset` has nothing to train on in row {first}: {rows[first]!r:.80} has no token with a loss after the first "
                f"one among {max_length} tokens (`max_length`, `target_max_length` in the trainer). Remove such rows, or raise the "
                "limit."
            )
        self.ratio, self.seed = ratio, seed
        self.held_out = examples[::HELD_OUT]
        self.for_training = [example for i, example in enumerate(examples) if i % HELD_OUT]

    def beside(self, num_generated: int, step: int) -> list[dict[str, Any]]:
        """Real examples for a training run with `num_generated` generated ones. Each step draws others."""
        number = num_replayed(num_generated, self.ratio)
        return [self.for_training[i] for i in draw(len(self.for_training), number, self.seed + step)]

    def beside_in_validation(self, num_generated: int) -> list[dict[str, Any]]:
        """Real examples for a validation, from the held-out rows. They are the same for the same `num_generated`."""
        number = num_replayed(num_generated, self.ratio)
        return [self.held_out[i] for i in draw(len(self.held_out), number, self.seed)]
