"""Credit to look at: each of a completion's words, and the best one that could have stood there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import special_ids
from .alignment import NOT_WRITTEN, complete_after, decoded


@dataclass
class WordCredit:
    """
    What one of the generator's tokens earned, to be shown.

    Attributes:
        text (`str`): Its text.
        credit (`float`): Metagradient of what it wrote.
        best (`str`, *optional*): The candidate with the highest metagradient at its place, if there are candidates.
        best_credit (`float`, *optional*): Metagradient of that one.
    """

    text: str
    credit: float
    best: str | None = None
    best_credit: float | None = None


def credit_text(words: Sequence[WordCredit]) -> str:
    """
    Credit of each word in plain text, in units of the mean absolute credit, and the best word behind it if it is better.
    For example `the +0.7 | cat -1.3 (sea +2.0)`.
    """
    unit = sum(abs(word.credit) for word in words) / max(len(words), 1) or 1.0
    parts = []
    for word in words:
        better = ""
        if word.best is not None and word.best_credit is not None and word.best_credit > word.credit:
            better = f" ({_visible(word.best)} {word.best_credit / unit:+.1f})"
        parts.append(f"{_visible(word.text)} {word.credit / unit:+.1f}{better}")
    return " | ".join(parts)


def _visible(text: str) -> str:
    """A word without the space around it, or the name of a space that is the whole word, such as \\n."""
    return text.strip() or repr(text)[1:-1] or "∅"


def word_credits(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], credits: Tensor, candidates: Tensor | None
) -> list[WordCredit]:
    """
    Credit of each of the generator's tokens, from metagradients of the target's tokens and of their candidates.

    `example` has `completion_ids`, `written_by` and, with `candidates`, the `candidates` of a completion. `credits` has the shape
    `(tokens,)`, `candidates` `(tokens, k)`.
    """
    ids, special = example["completion_ids"], special_ids(tokenizer)
    text = decoded(tokenizer, ids)
    ends = complete_after(tokenizer, ids, text)
    words = [
        WordCredit(str(tokenizer.decode([token])) if token in special else text[start:end], 0.0)
        for token, start, end in zip(ids, [0, *ends[:-1]], ends, strict=True)
    ]
    for position, owner in enumerate(example["written_by"]):
        if owner == NOT_WRITTEN:
            continue
        words[owner].credit += credits[position].item()
        if candidates is not None and (example["candidates"][position] >= 0).any():
            known = candidates[position].masked_fill(example["candidates"][position] < 0, -torch.inf)
            best = int(known.argmax())
            words[owner].best = str(tokenizer.decode([int(example["candidates"][position, best])]))
            words[owner].best_credit = known[best].item()
    return words
