"""Completions of the generator in, training examples of the target out."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

Messages = list[dict[str, Any]]


def completion_parts(completion: str | Messages) -> list[str]:
    """Texts of a completion, plain or conversational, that follow each other: what the generator wrote, and no tool's answer."""
    if isinstance(completion, str):
        return [completion]
    return [message_text(message) for message in completion if message["role"] == "assistant"]


def completion_text(completion: str | Messages) -> str:
    """Text of a completion, plain or conversational. Texts before and after a tool's answer are lines of their own."""
    return "\n".join(filter(None, completion_parts(completion)))


def turns(mask: list[int]) -> list[range]:
    """Where the tokens are that the generator wrote in one go, of a mask that is 0 for those of tools and environments."""
    edges = [i for i, (before, after) in enumerate(pairwise([0, *mask, 0])) if before != after]
    return [range(*span) for span in zip(edges[::2], edges[1::2], strict=True)]


def generated_parts(
    completion: str | Messages, completion_ids: list[int], mask: list[int], processing_class: PreTrainedTokenizerBase
) -> list[str]:
    """
    Texts of a completion that the generator wrote, also where a `rollout_func` put an environment's texts between them.

    TRL decodes what a `rollout_func` returns as one text, and only `mask` tells whose tokens are whose. The outputs of `tools` are
    messages of their own.
    """
    if 0 not in mask or (isinstance(completion, list) and len(completion) > 1):
        return completion_parts(completion)
    spans = [completion_ids[turn.start : turn.stop] for turn in turns(mask)]
    return [str(processing_class.decode(ids, skip_special_tokens=True)) for ids in spans]


def with_parts(completion: str | Messages, parts: list[str]) -> str | Messages:
    """A completion of the same form with these texts: as text, as the assistant's messages, or as one message of all of them."""
    if isinstance(completion, list) and len(completion_parts(completion)) == len(parts):
        texts = iter(parts)
        return [m if m["role"] != "assistant" else {**m, "content": _content(m, next(texts))} for m in completion]
    text = "\n".join(filter(None, parts))
    return text if isinstance(completion, str) else [{"role": "assistant", "content": text}]


def _content(message: dict[str, Any], text: str) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text


def target_text(
    prompt: str | Messages, completion: str | Messages, formatting_func: Callable[[dict[str, Any]], str] | None = None
) -> str:
    """The text that the target is trained on for one completion, as of [`to_target_examples`]; "" for an empty one."""
    text = completion_text(completion)
    if not text.strip():
        return ""
    if formatting_func is None:
        return text
    text = formatting_func({"prompt": prompt, "completion": completion})
    if not isinstance(text, str):
        raise ValueError(
            f"`formatting_func` must return the text to train on, got {text!r:.80} of type {type(text).__name__}. "
            "Return one string per example."
        )
    return text


def repeated_places(
    text: str, prompt: str | Messages, completion: str | Messages, formatting_func: Callable[[dict[str, Any]], str]
) -> list[tuple[int, int]]:
    """
    Where a formatted text has the parts of a completion, if the text holds the words of one of them more than once.

    A prompt or an ending may hold the same words, and the text may repeat the completion. A text with marks in place of the parts
    tells them apart.

    Returns:
        `list[tuple[int, int]]`: Index of each part and the character at which it begins, in the order of the text. Empty where
            each part occurs once, and where `formatting_func` does not treat marks as it treats the parts.
    """
    parts = completion_parts(completion)
    if all(text.find(part.strip()) == text.rfind(part.strip()) for part in parts if part.strip()):
        return []
    marks = [f"\ue000{i}\ue001" if part.strip() else part for i, part in enumerate(parts)]
    marked = target_text(prompt, with_parts(completion, marks), formatting_func)
    places, end = [], 0
    before, *rest = re.split("\ue000(\\d+)\ue001", marked)
    for index, after in zip(map(int, rest[::2]), rest[1::2], strict=True):
        whole = parts[index]
        part = next((p for p in (whole, whole.strip()) if text.startswith(before + p + after, end)), None)
        if part is None:
            before = None
            break
        places.append((index, end + len(before)))
        before, end = after, end + len(before) + len(part)
    if before is None or text[end:] != before:
        logger.warning_once(
            f"`formatting_func` returned {text!r:.80}, which holds the words of the completion more than once, and it formats another "
            "completion in another way. Credit goes to the last of them. Have it put every completion into the same frame."
        )
        return []
    return places


def message_text(message: dict[str, Any]) -> str:
    """Text of a message, whose content is a string, a list of typed parts, or nothing. Parts that are no text are left out."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def to_target_examples(
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
    ended: Sequence[bool],
    processing_class: PreTrainedTokenizerBase,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
) -> list[dict[str, Any]]:
    """
    What the target is trained on for completions: their texts in the target's own tokens.

    The tokenizer adds what it adds to any text (BOS, where it does). One EOS stands at the end where the completion ended by
    itself, and none where it did not, also if tokenizer or `formatting_func` ends every text.

    Args:
        prompts, completions (`Sequence[str]` or `Sequence[list[dict]]`):
            What the generator was given, and what it wrote. The target sees no prompt unless `formatting_func` uses it.
        ended (`Sequence[bool]`):
            Whether each completion ended by itself, rather than by reaching the maximum length.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        formatting_func (`Callable`, *optional*):
            As of [`~trl_dpg.fine_tuning.TargetFineTuning`].

    Returns:
        `list[dict]`: `text` and `input_ids` of each, both empty for an empty completion.
    """
    texts = [target_text(p, c, formatting_func) for p, c in zip(prompts, completions, strict=True)]
    full = [i for i, text in enumerate(texts) if text]
    tokens = processing_class([texts[i] for i in full])["input_ids"] if full else []
    eos = processing_class.eos_token_id
    closing = {eos}  # a chat template may close its messages with another token than EOS
    if formatting_func is not None:
        closing |= special_ids(processing_class) - {processing_class.unk_token_id}
    examples: list[dict[str, Any]] = [{"input_ids": [], "text": text} for text in texts]
    for i, ids in zip(full, tokens, strict=True):
        ids = _without_end(list(ids), {eos} if ended[i] else closing, processing_class)
        examples[i]["input_ids"] = [*ids, eos] if ended[i] and eos is not None else ids
    return examples


def special_ids(processing_class: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens, which decoding leaves out: also those without a name in the tokenizer, such as the end of a turn."""
    added = processing_class.added_tokens_decoder.items()
    return {*processing_class.all_special_ids, *(index for index, token in added if token.special)}


def _without_end(input_ids: list[int], ends: set[int | None], processing_class: PreTrainedTokenizerBase) -> list[int]:
    """
    What comes before the tokens that end a text.

    Some tokenizers add one to every text, and so do chat templates, which put a line break behind it.
    """
    length = len(input_ids)
    for i in reversed(range(len(input_ids))):
        if input_ids[i] in ends:
            length = i
        elif str(processing_class.decode([input_ids[i]])).strip():
            break
    return input_ids[:length]


def indices_to_train_on(examples: list[dict[str, Any]]) -> list[int]:
    """
    Which examples have something to train on: two tokens or more, as the first has nothing before it.

    Raises:
        [`ValueError`]: If there are none.
    """
    indices = [i for i, example in enumerate(examples) if len(example["input_ids"]) > 1]
    if not indices:
        raise ValueError(
            f"All {len(examples)} completions are empty or one token long, so there is nothing to fine-tune the target on. "
            "Ask for longer ones (`max_completion_length`, or `min_new_tokens` in `generation_kwargs`), or lower the "
            "generator's `learning_rate` if it collapsed to this."
        )
    return indices
