"""From the target's tokens back to the generator's: the two meet in the characters."""

from bisect import bisect_right
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import special_ids
from ..data import turns as turns_of


NOT_WRITTEN = -1  # a token of the target that the generator did not write: BOS, a prompt, a template


def written_by(
    example: dict[str, Any], generator_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """
    For each of the target's tokens, the generator's token that wrote it.

    The two meet in the characters. A token of the target belongs to the generator's token that completes its last character.
    So no token of the generator is left out of what depends on it: its reward-to-go holds all that it took part in.

    Args:
        example (`dict`):
            An example of [`~trl_dpg.fine_tuning.TargetFineTuning.target_examples`]. `parts` are what the generator wrote, several
            if tools were called. Without `places`, they are looked for in `text` from its end: a prompt stands before them. With
            `closing`, `text` is a chat template's, in which that token is the end.
        generator_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the generator.
        target_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.

    Returns:
        `list[int]`: Indices into `completion_ids`, -1 for a token that the generator did not write.

    Raises:
        [`ValueError`]: If a part does not occur in `text`.
    """
    parts, text, input_ids = example["parts"], example["text"], example["input_ids"]
    closing = example.get("closing", target_tokenizer.eos_token_id)
    written = example["ended"] and closing is not None  # the end, too
    body = example["completion_ids"][:-1] if written else example["completion_ids"]
    end, tokens = [], input_ids
    if written:
        behind = input_ids[::-1].index(closing)  # of a chat template
        end, tokens = [len(body)] + [NOT_WRITTEN] * behind, input_ids[: len(input_ids) - 1 - behind]
    num_before = len(input_ids) - len(body) - len(end)  # a BOS token
    same_text = len(parts) == 1 and text == parts[0]
    if same_text and num_before in (0, 1) and input_ids[num_before : num_before + len(body)] == body:
        return [NOT_WRITTEN] * num_before + [*range(len(body)), *end]

    owner = [NOT_WRITTEN] * len(text)  # of each character
    turns = turns_of(example["generated"][: len(body)])
    if len(turns) < len(parts):
        turns = [range(len(body))] * len(parts)
    for index, start in example.get("places") or _places_from_the_end(parts, text):
        turn = turns[index]
        part = parts[index] if text.startswith(parts[index], start) else parts[index].strip()
        writers = _writers(part, body[turn.start : turn.stop], generator_tokenizer)
        owner[start : start + len(part)] = [turn.start + j for j in writers]
    last = _last_characters(target_tokenizer, tokens, text, add_special_tokens="closing" not in example)
    return [owner[c] if c >= 0 else NOT_WRITTEN for c in last] + end


def _places_from_the_end(parts: list[str], text: str) -> list[tuple[int, int]]:
    places, before = [], len(text)
    for index, part in reversed(list(enumerate(parts))):
        start = text.rfind(part, 0, before)
        if start < 0:
            start = text.rfind(part.strip(), 0, before)
        if start < 0:
            raise ValueError(
                f"`formatting_func` returned {text!r:.80}, in which the completion {part!r:.80} does not occur as it is, so "
                "`credit_assignment` cannot tell which of its tokens the generator wrote. Keep the completion's text, or set "
                '`credit_assignment="sequence"`.'
            )
        places.append((index, start))
        before = start
    return places


def _writers(part: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Which of the tokens wrote each character of a text."""
    generated = decoded(tokenizer, ids)
    if part not in generated:  # what a parser of tool calls changed is its last token's, which has seen all of it
        generated = part
    ends = complete_after(tokenizer, ids, generated)
    found = generated.index(part)
    return [min(bisect_right(ends, found + i), len(ids) - 1) for i in range(len(part))]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))  # as TRL does


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[tuple[int, int]] | None:
    """Spans of characters of each token, if that is how the tokenizer takes the text apart. Special tokens are at (0, 0)."""
    if not tokenizer.is_fast:
        return None
    special = special_ids(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != [token for token in ids if token not in special]:
        return None
    spans = iter(encoded["offset_mapping"])
    return [(0, 0) if token in special else next(spans) for token in ids]


def complete_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[int]:
    """How many characters of a text are complete after each token."""
    offsets = _offsets(tokenizer, ids, text)
    ends: list[int] = []
    done = 0
    for j in range(len(ids)):
        if offsets is None:  # drawn tokens that the tokenizer would have put otherwise
            prefix = decoded(tokenizer, ids[: j + 1])
            while done < min(len(prefix), len(text)) and prefix[done] == text[done]:
                done += 1
        else:
            end = offsets[j][1]
            following = offsets[j + 1] if j + 1 < len(ids) else (end, end)
            # The bytes of one character may be several tokens: only the last completes it.
            done = max(done, min(end, following[0]) if following[1] > 0 else end)
        ends.append(done)
    return ends


def _last_characters(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, add_special_tokens: bool
) -> list[int]:
    """Index of the last character that each of a text's tokens has a part in, -1 for those that the tokenizer added."""
    if tokenizer.is_fast:  # which also knows what an unknown token stands for
        kwargs = {"add_special_tokens": add_special_tokens, "return_special_tokens_mask": True}
        encoded = tokenizer(text, return_offsets_mapping=True, **kwargs)
        places = zip(encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
        return [-1 if added else max(end - 1, 0) for added, (_, end) in places][: len(ids)]
    special = special_ids(tokenizer)
    ends = complete_after(tokenizer, ids, text)
    if text[max(ends, default=0) :].strip():
        raise ValueError(
            f"`target_processing_class` ({type(tokenizer).__name__}) decodes {text!r:.80} as {decoded(tokenizer, ids)!r:.80}, so "
            "`credit_assignment` cannot tell which of its tokens the generator wrote. Use a fast tokenizer, or set "
            '`credit_assignment="sequence"`.'
        )
    last, before = [], 0
    for token, end in zip(ids, ends, strict=True):
        last.append(-1 if token in special else min(max(end - 1, before), len(text) - 1))
        before = end
    return last


def aligned_candidates(
    candidates: Tensor, example: dict[str, Any], eos_token_ids: list[int], eos: int | None
) -> Tensor:
    """
    The generator's candidates where the target's tokens stand, shape `(len(input_ids), k)`, -1 for none.

    A position has candidates if the two tokenizers agree on it (one token of each, the same one) and it has a loss.

    Args:
        candidates (`Tensor`):
            Candidates at each of `completion_ids`, shape `(len(completion_ids), k)`, -1 for none.
        example (`dict`):
            `completion_ids`, `input_ids`, maybe `labels`, and what [`written_by`] returned, as `written_by`.
        eos_token_ids (`list[int]`):
            Tokens that end a completion; any of them is the target's `eos`.
        eos (`int`, *optional*):
            The token that ends the target's text: its EOS, or the example's `closing`. Without one, no end is a candidate.
    """
    for ending in set(eos_token_ids) - {eos}:
        candidates = candidates.masked_fill(candidates == ending, -1 if eos is None else eos)
    owners, ids, input_ids = example["written_by"], example["completion_ids"], example["input_ids"]
    labels = example.get("labels", input_ids)
    tokens = Counter(owners)
    agreeing = [
        position
        for position, owner in enumerate(owners)
        if position > 0  # nothing predicts the first
        and owner != NOT_WRITTEN
        and labels[position] != -100
        and tokens[owner] == 1
        and input_ids[position] == (eos if ids[owner] in eos_token_ids else ids[owner])
    ]
    result = torch.full((len(input_ids), candidates.shape[1]), -1)
    result[agreeing] = candidates[[owners[position] for position in agreeing]]
    return result
