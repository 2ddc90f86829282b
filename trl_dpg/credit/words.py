"""Credit of a completion's tokens for a person to read, with the best candidate at each position."""

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
    Credit of one of the generator's tokens, for a person to read.

    Attributes:
        text (`str`): Text of the token.
        credit (`float`): Metagradient of the target's tokens that it wrote.
        best (`str`, *optional*): The candidate with the highest metagradient at this position, if there are candidates.
        best_credit (`float`, *optional*): Metagradient of this candidate.
    """

    text: str
    credit: float
    best: str | None = None
    best_credit: float | None = None


def credit_text(words: Sequence[WordCredit]) -> str:
    """
    Writes each word with its credit, in units of the mean absolute credit. A better candidate follows in parentheses:
    `the +0.7 | cat -1.3 (sea +2.0)`.
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
    """A word without surrounding whitespace. A word of whitespace alone is escaped, such as \\n."""
    return text.strip() or repr(text)[1:-1] or "∅"


def word_credits(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], credits: Tensor, candidates: Tensor | None
) -> list[WordCredit]:
    """
    Computes the credit of each of the generator's tokens from metagradients of the target's tokens and of their candidates.

    `example` has `completion_ids` and `written_by` of a completion, and the token ids `candidates` if metagradients of candidates are
    given. `credits` has the shape `(tokens,)`, the argument `candidates` the shape `(tokens, k)`.
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
