"""Tokenizes rows of SFT data for the target, and decides which tokens have a loss, as TRL's `SFTTrainer` does."""

import json
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length


Row = dict[str, Any]  # has `text`, `messages`, or `prompt` and `completion` (two texts or two lists of messages)


def is_chat(row: Row) -> bool:
    """Whether a row has messages instead of text. Raises a [`ValueError`] if it has neither."""
    names = ["prompt", "completion"] if "prompt" in row else ["messages"] if "messages" in row else ["text"]
    values = [row.get(name) for name in names]
    if names != ["messages"] and all(isinstance(value, str) for value in values):
        return False
    if names != ["text"] and all(map(_are_messages, values)):
        return True
    raise ValueError(
        f"{row!r:.80} is nothing to train on. It needs `text`, `messages`, or `prompt` and `completion`, which are two texts or two "
        "lists of messages with a `role`. Correct the result of `formatting_func`, or the row of the data set."
    )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, dict) and "role" in m for m in value)


def check_loss(
    formatting_func: Callable | None,
    completion_only_loss: bool | None,
    assistant_only_loss: bool,
    processing_class: PreTrainedTokenizerBase | None,
) -> None:
    """Raises a [`ValueError`] if the target's examples cannot have such a loss, as far as this shows before there are examples."""
    for name, value, choices in (
        ("completion_only_loss", completion_only_loss, (None, True, False)),
        ("assistant_only_loss", assistant_only_loss, (True, False)),
    ):
        if value not in choices:
            raise ValueError(
                f"`{name}` (`target_{name}` in the trainer) must be {' or '.join(map(str, choices))}, got {value!r}."
            )
    if formatting_func is None:
        _check_kind(False, False, completion_only_loss, assistant_only_loss)
    if assistant_only_loss and processing_class is not None:
        _training_template(processing_class)


def _check_kind(has_prompt: bool, chat: bool, completion_only_loss: bool | None, assistant_only_loss: bool) -> None:
    what = "messages" if chat else "text"
    if completion_only_loss and not has_prompt:
        raise ValueError(
            "`completion_only_loss=True` (`target_completion_only_loss` in the trainer) needs a prompt and a completion, but the "
            f"target is trained on {what} alone. Make `formatting_func` return "
            '{"prompt": ..., "completion": ...}, or leave `completion_only_loss` at None.'
        )
    if assistant_only_loss and not chat:
        raise ValueError(
            "`assistant_only_loss=True` (`target_assistant_only_loss` in the trainer) needs messages, but the target is trained on "
            'plain text. Make `formatting_func` return {"prompt": ..., "completion": ...} with lists of messages, or leave '
            "`assistant_only_loss` at False."
        )


def _training_template(processing_class: PreTrainedTokenizerBase) -> str | None:
    """A chat template that marks the assistant's parts. `None` if the tokenizer's own template does."""
    try:
        if processing_class.chat_template and has_generation_markers(processing_class.chat_template):
            return None
        return get_training_chat_template(processing_class)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "`assistant_only_loss=True` (`target_assistant_only_loss` in the trainer) needs a chat template that marks the "
            "assistant's parts with `{% generation %}`. The target's tokenizer has "
            f"{'a template without marks' if processing_class.chat_template else 'no template'}, and TRL knows no marked one for it. "
            "Set `processing_class.chat_template`, or leave `assistant_only_loss` at False."
        ) from error


def row_text(row: Row, processing_class: PreTrainedTokenizerBase, assistant_only_loss: bool) -> str:
    """The text that the target reads: the row's text, or its messages in the chat template."""
    if is_chat(row):
        return _templated(row, _messages(row), processing_class, assistant_only_loss, tokenize=False)
    return row["prompt"] + row["completion"] if "prompt" in row else row["text"]


def _messages(row: Row) -> list[dict[str, Any]]:
    return row["prompt"] + row["completion"] if "prompt" in row else row["messages"]


def _templated(
    row: Row, messages: list, processing_class: PreTrainedTokenizerBase, assistant_only_loss: bool, **kwargs: Any
) -> Any:
    """Applies the chat template to messages of a row. As in `SFTTrainer`, it reads the columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    of_template = {
        "chat_template": _training_template(processing_class) if assistant_only_loss else None,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    try:
        return processing_class.apply_chat_template(messages, **of_template, **kwargs)
    except (ValueError, TemplateError) as error:
        raise ValueError(
            f"The chat template of the target's tokenizer does not accept the messages {messages!r:.80}: {error} Give the tokenizer "
            "(`target_processing_class` in the trainer) a template that accepts them, or train on texts."
        ) from error


def encode(
    rows: list[Row],
    processing_class: PreTrainedTokenizerBase,
    completion_only_loss: bool | None,
    assistant_only_loss: bool,
) -> list[tuple[list[int], list[bool]]]:
    """
    Tokenizes rows. Returns the tokens of each, and whether each token has a loss.

    An EOS is there only if the tokenizer or the chat template adds one, or if the text has one. A completion starts where the tokens of
    the prompt and of prompt and completion diverge.

    Raises:
        [`ValueError`]: If a row has nothing to train on, or if the loss does not fit the rows.
    """
    if not rows:
        return []
    kinds = {("prompt" in row, is_chat(row)): row for row in rows}
    if len(kinds) > 1:
        first, other = list(kinds.values())[:2]
        raise ValueError(
            f"{first!r:.80} and {other!r:.80} are of different kinds. Train the target on texts, on texts with prompts, or on "
            "messages alone: make `formatting_func` return one kind, or split the data set."
        )
    ((has_prompt, chat),) = kinds
    _check_kind(has_prompt, chat, completion_only_loss, assistant_only_loss)
    if completion_only_loss is None:
        completion_only_loss = has_prompt
    prompts: list[list[int]] = [[]] * len(rows)
    if chat:
        as_template = processing_class, assistant_only_loss
        whole: Any = {"return_assistant_tokens_mask": assistant_only_loss, "tokenize": True, "return_dict": True}
        encoded = [_templated(row, _messages(row), *as_template, **whole) for row in rows]
        if completion_only_loss:
            alone: Any = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            prompts = [_templated(row, row["prompt"], *as_template, **alone) for row in rows]
    else:
        tokens = processing_class([row_text(r, processing_class, False) for r in rows])["input_ids"]
        encoded = [{"input_ids": ids} for ids in tokens]
        if completion_only_loss:
            prompts = processing_class([r["prompt"] for r in rows])["input_ids"]
    return [_with_loss(*each) for each in zip(rows, encoded, prompts, strict=True)]


def _with_loss(row: Row, encoded: Any, prompt: list[int]) -> tuple[list[int], list[bool]]:
    """Tokens of a row, and whether each has a loss. Those of the `prompt` have none. With an assistant's mask, only marked ones have."""
    ids = list(encoded["input_ids"])
    said = encoded.get("assistant_masks")
    if said is not None and 1 not in said:
        raise ValueError(
            f"`assistant_only_loss=True` (`target_assistant_only_loss` in the trainer), but the assistant says nothing in {row!r:.80}, "
            "by the `{% generation %}` marks of the chat template. Correct the template or the row, or leave `assistant_only_loss` at "
            "False."
        )
    start = common_prefix_length(prompt, ids)
    return ids, [i >= start and bool(said is None or said[i]) for i in range(len(ids))]
