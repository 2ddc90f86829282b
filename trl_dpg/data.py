"""Completions of the generator in, training examples of the target out."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .sft_rows import Row, encode, is_chat, row_text


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


def target_row(
    prompt: str | Messages, completion: str | Messages, formatting_func: Callable[[Row], str | Row] | None = None
) -> Row | None:
    """What the target is trained on for one completion, as of [`to_target_examples`]; `None` for an empty one."""
    text = completion_text(completion)
    if not text.strip():
        return None
    if formatting_func is None:
        return {"text": text}
    row = formatting_func({"prompt": prompt, "completion": completion})
    if isinstance(row, str):
        return {"text": row} if row else None
    if not isinstance(row, dict) or not {"prompt", "completion"} <= row.keys():
        raise ValueError(
            f"`formatting_func` must return the text to train on, got {row!r:.80} of type {type(row).__name__}. Return one string "
            "per example, or a dict with both `prompt` and `completion`."
        )
    parts = map(message_text, row["completion"]) if is_chat(row) else [row["completion"]]
    if not any(part.strip() for part in parts):
        raise ValueError(
            f"`formatting_func` returned the empty `completion` {row['completion']!r:.80}, which has nothing to train on. Put what the "
            "generator wrote into it."
        )
    return row


def repeated_places(
    text: str, prompt: str | Messages, completion: str | Messages, text_of: Callable[[Row], str]
) -> list[tuple[int, int]]:
    """
    Where a formatted text has the parts of a completion, if the text holds the words of one of them more than once.

    A prompt or an ending may hold the same words, and the text may repeat the completion. A text with marks in place of the parts
    tells them apart. `text_of` gives the text for a `prompt` and a `completion`.

    Returns:
        `list[tuple[int, int]]`: Index of each part and the character at which it begins, in the order of the text. Empty where
            each part occurs once, and where `formatting_func` does not treat marks as it treats the parts.
    """
    parts = completion_parts(completion)
    if all(text.find(part.strip()) == text.rfind(part.strip()) for part in parts if part.strip()):
        return []
    marks = [f"\ue000{i}\ue001" if part.strip() else part for i, part in enumerate(parts)]
    marked = text_of({"prompt": prompt, "completion": with_parts(completion, marks)})
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
    formatting_func: Callable[[Row], str | Row] | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> list[dict[str, Any]]:
    """
    What the target is trained on for completions: their texts in the target's own tokens.

    The tokenizer adds what it adds to any text (BOS, where it does). One EOS stands at the end where the completion ended by
    itself, and none where it did not, also if tokenizer or `formatting_func` ends every text. Messages end as the chat template
    ends them; with an EOS if it does not.

    Args:
        prompts, completions (`Sequence[str]` or `Sequence[list[dict]]`):
            What the generator was given, and what it wrote. The target sees no prompt unless `formatting_func` uses it.
        ended (`Sequence[bool]`):
            Whether each completion ended by itself, rather than by reaching the maximum length.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        formatting_func (`Callable`), completion_only_loss (`bool`), assistant_only_loss (`bool`) (*optional*):
            As of [`~trl_dpg.fine_tuning.TargetFineTuning`].

    Returns:
        `list[dict]`: `text` and `input_ids` of each, both empty for an empty completion; `labels` where not every token has a
            loss; `closing`, of messages, the token that ends them.
    """
    written = [target_row(p, c, formatting_func) for p, c in zip(prompts, completions, strict=True)]
    rows = {i: row for i, row in enumerate(written) if row is not None}
    encoded = encode(list(rows.values()), processing_class, completion_only_loss, assistant_only_loss)
    eos = processing_class.eos_token_id
    closing = {eos}  # a chat template may close its messages with another token than EOS
    if formatting_func is not None:
        closing |= special_ids(processing_class) - {processing_class.unk_token_id}
    examples: list[dict[str, Any]] = [{"input_ids": [], "text": ""} for _ in written]
    for (i, row), (ids, supervised) in zip(rows.items(), encoded, strict=True):
        chat = is_chat(row)
        length = _length_without_end(ids, closing if chat or not ended[i] else {eos}, processing_class)
        end = ids[length : length + 1] if chat else []  # the template's own
        if not (end and ended[i]):
            appended = [eos] if ended[i] and eos is not None else []
            ids, supervised = [*ids[:length], *appended], [*supervised[:length], *[True] * len(appended)]
        examples[i] = {**_example(ids, supervised), "text": row_text(row, processing_class, assistant_only_loss)}
        if chat:
            examples[i]["closing"] = end[0] if end else eos
    return examples


def dataset_examples(
    rows: Iterable[Row],
    processing_class: PreTrainedTokenizerBase,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> list[dict[str, Any]]:
    """
    Rows of a data set as examples for the target, token for token and label for label as [`~trl.SFTTrainer`] prepares them.

    An EOS stands at the end of texts and plain completions. Nothing is cut off: the engine does that, by `max_length`.

    Args:
        rows (`Iterable[dict]`):
            Rows with `text`; with `prompt` and `completion`, two texts or two lists of messages; or with `messages`. All alike.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        completion_only_loss (`bool`), assistant_only_loss (`bool`) (*optional*):
            As of [`~trl_dpg.fine_tuning.TargetFineTuning`].

    Returns:
        `list[dict]`: `input_ids` of each, and `labels` where not every token has a loss.

    Raises:
        [`ValueError`]: If a row holds nothing to train on, or the loss does not go with the rows.
    """
    eos, closed = processing_class.eos_token or "", []
    for row in rows:
        name = "completion" if "prompt" in row else "text"
        text = row.get(name)
        closed.append({**row, name: text.removesuffix(eos) + eos} if isinstance(text, str) else row)
    return [_example(*e) for e in encode(closed, processing_class, completion_only_loss, assistant_only_loss)]


def _example(input_ids: list[int], supervised: list[bool]) -> dict[str, Any]:
    if all(supervised):
        return {"input_ids": input_ids}
    labels = [token if bit else -100 for token, bit in zip(input_ids, supervised, strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def special_ids(processing_class: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens, which decoding leaves out: also those without a name in the tokenizer, such as the end of a turn."""
    added = processing_class.added_tokens_decoder.items()
    return {*processing_class.all_special_ids, *(index for index, token in added if token.special)}


def _length_without_end(input_ids: list[int], ends: set[int | None], processing_class: PreTrainedTokenizerBase) -> int:
    """
    How many tokens come before those that end a text.

    Some tokenizers add one to every text, and so do chat templates, which put a line break behind it.
    """
    length = len(input_ids)
    for i in reversed(range(len(input_ids))):
        if input_ids[i] in ends:
            length = i
        elif str(processing_class.decode([input_ids[i]])).strip():
            break
    return length


def indices_to_train_on(examples: list[dict[str, Any]], max_length: int | None = None) -> list[int]:
    """
    Which examples have something to train on: a token with a loss behind the first, which has nothing before it.

    Of each, the first `max_length` tokens are kept; all if `None`.

    Raises:
        [`ValueError`]: If there are none.
    """
    labels = [example.get("labels", example["input_ids"])[1:max_length] for example in examples]
    indices = [i for i, row in enumerate(labels) if any(label != -100 for label in row)]
    if not indices:
        raise ValueError(
            f"All {len(examples)} completions are empty or one token long, or a prompt fills `max_length` {max_length} "
            "(`target_max_length` in the trainer), so there is nothing to fine-tune the target on. "
            "Ask for longer ones (`max_completion_length`, or `min_new_tokens` in `generation_kwargs`), raise `max_length`, or lower "
            "the generator's `learning_rate` if it collapsed to this."
        )
    return indices
