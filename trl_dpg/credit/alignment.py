"""Matches the target's tokens to the generator's tokens, by the characters of the text."""

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
    Finds, for each of the target's tokens, the generator's token that wrote it.

    Tokens are matched by characters. A token of the target belongs to the generator's token that completes its last character.
    All generator tokens that share a target token come no later than this one, so the reward-to-go of each includes its credit.

    Args:
        example (`dict`):
            An example of [`~trl_dpg.fine_tuning.TargetFineTuning.target_examples`]. `parts` are the texts that the generator wrote,
            several if tools were called. Without `places`, they are searched in `text` from its end, because a prompt stands before
            them. With `closing`, a chat template made `text`, and the token `closing` ends it.
        generator_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the generator.
        target_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.

    Returns:
        `list[int]`: For each of the target's tokens, an index into `completion_ids`, or -1 if the generator did not write it.

    Raises:
        [`ValueError`]: If a part does not occur in `text`.
    """
    parts, text, input_ids = example["parts"], example["text"], example["input_ids"]
    closing = example.get("closing", target_tokenizer.eos_token_id)
    written = example["ended"] and closing is not None  # the generator wrote the end token, too
    body = example["completion_ids"][:-1] if written else example["completion_ids"]
    end, tokens = [], input_ids
    if written:
        behind = input_ids[::-1].index(closing)  # number of tokens after the end token, from a chat template
        end, tokens = [len(body)] + [NOT_WRITTEN] * behind, input_ids[: len(input_ids) - 1 - behind]
    num_before = len(input_ids) - len(body) - len(end)  # a BOS token
    same_text = len(parts) == 1 and text == parts[0]
    if same_text and num_before in (0, 1) and input_ids[num_before : num_before + len(body)] == body:
        return [NOT_WRITTEN] * num_before + [*range(len(body)), *end]

    owner = [NOT_WRITTEN] * len(text)  # the generator's token that wrote each character
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
                f"`formatting_func` returned {text!r:.80}, which does not contain the completion {part!r:.80} unchanged. So "
                "`credit_assignment` cannot tell which tokens the generator wrote. Keep the completion's text, or set "
                '`credit_assignment="sequence"`.'
            )
        places.append((index, start))
        before = start
    return places


def _writers(part: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """For each character of a text, the index of the token that wrote it."""
    generated = decoded(tokenizer, ids)
    if part not in generated:  # a parser of tool calls changed the text: the rest belongs to the last token
        generated = part
    ends = complete_after(tokenizer, ids, generated)
    found = generated.index(part)
    return [min(bisect_right(ends, found + i), len(ids) - 1) for i in range(len(part))]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))  # as TRL decodes completions


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[tuple[int, int]] | None:
    """Span of characters of each token, (0, 0) for special tokens. `None` if the tokenizer splits the text into other tokens."""
    if not tokenizer.is_fast:
        return None
    special = special_ids(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != [token for token in ids if token not in special]:
        return None
    spans = iter(encoded["offset_mapping"])
    return [(0, 0) if token in special else next(spans) for token in ids]


def complete_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[int]:
    """Number of characters of a text that are complete after each token."""
    offsets = _offsets(tokenizer, ids, text)
    ends: list[int] = []
    done = 0
    for j in range(len(ids)):
        if offsets is None:  # the sampled tokens differ from the tokenizer's own split of the text
            prefix = decoded(tokenizer, ids[: j + 1])
            while done < min(len(prefix), len(text)) and prefix[done] == text[done]:
                done += 1
        else:
            end = offsets[j][1]
            following = offsets[j + 1] if j + 1 < len(ids) else (end, end)
            # Several tokens may hold the bytes of one character. Only the last one completes it.
            done = max(done, min(end, following[0]) if following[1] > 0 else end)
        ends.append(done)
    return ends


def _last_characters(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, add_special_tokens: bool
) -> list[int]:
    """Index of the last character of each token in a text, -1 for tokens that the tokenizer added."""
    if tokenizer.is_fast:  # only fast tokenizers know which characters an unknown token stands for
        kwargs = {"add_special_tokens": add_special_tokens, "return_special_tokens_mask": True}
        encoded = tokenizer(text, return_offsets_mapping=True, **kwargs)
        places = zip(encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
        return [-1 if added else max(end - 1, 0) for added, (_, end) in places][: len(ids)]
    special = special_ids(tokenizer)
    ends = complete_after(tokenizer, ids, text)
    if text[max(ends, default=0) :].strip():
        raise ValueError(
            f"`target_processing_class` ({type(tokenizer).__name__}) decodes {text!r:.80} as {decoded(tokenizer, ids)!r:.80}. So "
            "`credit_assignment` cannot tell which tokens the generator wrote. Use a fast tokenizer, or set "
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
    Moves the generator's candidates to the positions of the target's tokens, shape `(len(input_ids), k)`, -1 for none.

    A position has candidates if it has a loss and both tokenizers have the same single token there.

    Args:
        candidates (`Tensor`):
            Candidates at each token of `completion_ids`, shape `(len(completion_ids), k)`, -1 for none.
        example (`dict`):
            Has `completion_ids`, `input_ids`, optionally `labels`, and as `written_by` the result of [`written_by`].
        eos_token_ids (`list[int]`):
            Tokens that end a completion. Each of them stands for the target's `eos`.
        eos (`int`, *optional*):
            Token that ends the target's text: its EOS, or the example's `closing`. If `None`, no end token is a candidate.
    """
    for ending in set(eos_token_ids) - {eos}:
        candidates = candidates.masked_fill(candidates == ending, -1 if eos is None else eos)
    owners, ids, input_ids = example["written_by"], example["completion_ids"], example["input_ids"]
    labels = example.get("labels", input_ids)
    tokens = Counter(owners)
    agreeing = [
        position
        for position, owner in enumerate(owners)
        if position > 0  # the first token has no context that could predict it
        and owner != NOT_WRITTEN
        and labels[position] != -100
        and tokens[owner] == 1
        and input_ids[position] == (eos if ids[owner] in eos_token_ids else ids[owner])
    ]
    result = torch.full((len(input_ids), candidates.shape[1]), -1)
    result[agreeing] = candidates[[owners[position] for position in agreeing]]
    return result
