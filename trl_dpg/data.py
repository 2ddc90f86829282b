"""Makes training examples for the target from the generator's completions, or from rows of a data set."""

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
    """Texts that the generator wrote in a completion, plain or conversational, in order. Answers of tools are left out."""
    if isinstance(completion, str):
        return [completion]
    return [message_text(message) for message in completion if message["role"] == "assistant"]


def completion_text(completion: str | Messages) -> str:
    """Text of a completion, plain or conversational. Line breaks separate the texts before and after a tool's answer."""
    return "\n".join(filter(None, completion_parts(completion)))


def turns(mask: list[int]) -> list[range]:
    """Ranges of consecutive tokens that the generator wrote. `mask` is 0 for tokens of tools and environments."""
    edges = [i for i, (before, after) in enumerate(pairwise([0, *mask, 0])) if before != after]
    return [range(*span) for span in zip(edges[::2], edges[1::2], strict=True)]


def generated_parts(
    completion: str | Messages, completion_ids: list[int], mask: list[int], processing_class: PreTrainedTokenizerBase
) -> list[str]:
    """
    Texts that the generator wrote in a completion, even if a `rollout_func` put an environment's texts between them.

    TRL decodes the result of a `rollout_func` as one text. Only `mask` tells which tokens the generator wrote. Outputs of `tools`, in
    contrast, are separate messages.
    """
    if 0 not in mask or (isinstance(completion, list) and len(completion) > 1):
        return completion_parts(completion)
    spans = [completion_ids[turn.start : turn.stop] for turn in turns(mask)]
    return [str(processing_class.decode(ids, skip_special_tokens=True)) for ids in spans]


def with_parts(completion: str | Messages, parts: list[str]) -> str | Messages:
    """Replaces the texts of a completion by `parts`. If their number differs, all parts become one text or one message."""
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
    """The row that the target is trained on for a completion, see [`to_target_examples`]. `None` for an empty completion."""
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
            f"`formatting_func` returned the empty `completion` {row['completion']!r:.80}, which has nothing to train on. Put the "
            "generator's text into it."
        )
    return row


def repeated_places(
    text: str, prompt: str | Messages, completion: str | Messages, text_of: Callable[[Row], str]
) -> list[tuple[int, int]]:
    """
    Finds the parts of a completion in a formatted text that contains the words of a part more than once.

    A prompt or an ending may contain the same words, or the text may repeat the completion. To tell them apart, the function formats a
    completion with marks in place of the parts. `text_of` returns the text for a `prompt` and a `completion`.

    Returns:
        `list[tuple[int, int]]`: Index of each part and the character at which it begins, in the order of the text. Empty if
            each part occurs once, or if `formatting_func` formats marks differently from the parts.
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
            f"`formatting_func` returned {text!r:.80}, which contains the words of the completion more than once. It formats other "
            "completions differently, so these words cannot be told apart. Credit goes to the last of them. Make `formatting_func` use "
            "the same format for every completion."
        )
        return []
    return places


def message_text(message: dict[str, Any]) -> str:
    """Text of a message. Its content is a string, a list of typed parts, or nothing. Parts other than text are left out."""
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
    Makes training examples of completions, in the target's own tokens.

    The tokenizer adds the special tokens that it adds to any text, such as BOS. If a completion ended by itself, the example ends with
    one EOS. If not, it has no EOS, even if tokenizer or `formatting_func` ends every text with one. Messages end as the chat template
    ends them, or with an EOS if the template adds no end.

    Args:
        prompts, completions (`Sequence[str]` or `Sequence[list[dict]]`):
            The generator's prompts and completions. The target sees no prompt unless `formatting_func` uses it.
        ended (`Sequence[bool]`):
            Whether each completion ended by itself, rather than by reaching the maximum length.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        formatting_func (`Callable`), completion_only_loss (`bool`), assistant_only_loss (`bool`) (*optional*):
            As in [`~trl_dpg.fine_tuning.TargetFineTuning`].

    Returns:
        `list[dict]`: `text` and `input_ids` of each completion, both empty for an empty completion. Also `labels`, if not every
            token has a loss, and for messages `closing`, the token that ends them.
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
        end = ids[length : length + 1] if chat else []  # the token with which the template ends messages
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
    Makes examples for the target of rows of a data set, with the same tokens and labels as in [`~trl.SFTTrainer`].

    Texts and plain completions end with an EOS. Nothing is cut off here: the engine cuts at `max_length`.

    Args:
        rows (`Iterable[dict]`):
            Rows with `text`, `messages`, or `prompt` and `completion` (texts or lists of messages). All must be of the same kind.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        completion_only_loss (`bool`), assistant_only_loss (`bool`) (*optional*):
            As in [`~trl_dpg.fine_tuning.TargetFineTuning`].

    Returns:
        `list[dict]`: `input_ids` of each row, and `labels` if not every token has a loss.

    Raises:
        [`ValueError`]: If a row has nothing to train on, or if the arguments about the loss do not fit the rows.
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
    """Ids of special tokens, which decoding leaves out. Tokens without a name in the tokenizer, such as the end of a turn, count too."""
    added = processing_class.added_tokens_decoder.items()
    return {*processing_class.all_special_ids, *(index for index, token in added if token.special)}


def _length_without_end(input_ids: list[int], ends: set[int | None], processing_class: PreTrainedTokenizerBase) -> int:
    """
    Number of tokens before those that end a text.

    Some tokenizers add an end token to every text. Chat templates do so too, and add a line break after it.
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
    Indices of the examples that can be trained on: some token after the first one has a loss. The first token has no context.

    Only the first `max_length` tokens of an example count, or all if `None`.

    Raises:
        [`ValueError`]: If there is no such example.
    """
    labels = [example.get("labels", example["input_ids"])[1:max_length] for example in examples]
    indices = [i for i, row in enumerate(labels) if any(label != -100 for label in row)]
    if not indices:
        raise ValueError(
            f"All {len(examples)} completions are empty or one token long, or a prompt fills `max_length` {max_length} "
            "(`target_max_length` in the trainer), so there is nothing to fine-tune the target on. "
            "Ask for longer ones (`max_completion_length`, or `min_new_tokens` in `generation_kwargs`), or raise `max_length`. If the "
            "generator collapsed to such completions, lower its `learning_rate`."
        )
    return indices
