"""What the columns of a row beside `input_ids` and `labels` mean: applied, or refused by name, never ignored."""

from collections.abc import Mapping
from typing import Any

import torch


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
