"""Reading a pattern back from two checkpoints, without any training code."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import safe_open
from torch import nn

from .heads import lm_head_weight
from .pattern import decode_qr, token_ids


QR_SIZES = (21, 25, 29, 33)  # versions 1 to 4

# Names of tensors in checkpoints. They may have a prefix such as "transformer." or "model.".
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
EMBEDDING_NAMES = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class DecodedPattern:
    """
    Result of [`decode_pattern`].

    Attributes:
        signs (`torch.Tensor` of shape `(rows, columns)`):
            Signs of the change, int8: +1 (dark), −1 (light) or 0 (the weight did not move). Row r, column c belongs to
            hidden unit r and token c, or the c-th of `tokens`. `(signs == pattern).mean()` is the pixel accuracy.
        text (`str` or `None`):
            Text of the QR code, or `None` if the signs don't decode.
    """

    signs: torch.Tensor
    text: str | None


def decode_pattern(
    before: nn.Module | str | os.PathLike[str],
    after: nn.Module | str | os.PathLike[str],
    shape: tuple[int, int] | None = None,
    tokens: Sequence[int | str] | None = None,
) -> DecodedPattern:
    r"""
    Reads the picture that fine-tuning wrote into an LM head: sign(P_c − P_i) of its upper-left patch, or of the columns of `tokens`.

    Only the two checkpoints are needed, so anyone who has both can check where a model's training data came from. For a
    directory or Hub id, only the tensor of the LM head is read from the safetensors files. No model is built, and no code of the
    checkpoint runs. If a checkpoint has no tensor for the head, the input embedding is taken for it.

    Both checkpoints should have the precision that the target was trained in. Rounding to bfloat16 loses changes under
    about 0.4 % of a weight.

    Source: the QR experiment of Synthetic Data for any Differentiable Target (arXiv 2604.08423).

    Args:
        before, after ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], `str` or `PathLike`):
            The original and the fine-tuned checkpoint: a model, a directory, or a Hub id. For a PEFT model in memory, the effective
            weight is read. A checkpoint that holds only an adapter must be merged first.
        shape (`tuple[int, int]`, *optional*):
            Rows (hidden units) and columns (tokens) of the pattern. If `None`, QR codes of 21, 25, 29 and 33 modules
            are tried. The result is the first size that decodes, or else the largest size that fits in the head.
        tokens (`Sequence[int | str]`, *optional*):
            A token for each column, as in [`LMHeadPattern`]. Texts need the tokenizer of `before`. `None` means the first tokens.

    Returns:
        [`DecodedPattern`]: The signs, and the text if they are a readable QR code.

    Raises:
        [`ValueError`]: If a checkpoint cannot be read, if the two heads have different shapes or are equal, or if the pattern
            is larger than the heads or the number of `tokens`. Also if `tokens` are not tokens of the model.

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from trl_dpg.metrics import LMHeadPattern

    >>> config = GPT2Config(
    ...     vocab_size=32, n_positions=8, n_embd=32, n_layer=1, n_head=1, tie_word_embeddings=False
    ... )
    >>> before = GPT2LMHeadModel(config)
    >>> after = deepcopy(before)
    >>> _ = after.lm_head.weight.data[:21, :21].add_(1e-3 * LMHeadPattern.qr("DPG").pattern.T)
    >>> decode_pattern(before, after).text
    'DPG'

    ```
    """
    initial, final = (_lm_head(c, name) for c, name in ((before, "before"), (after, "after")))
    if initial.shape != final.shape:
        raise ValueError(
            f"The LM heads of `before` and `after` have different shapes, {tuple(initial.shape)} and "
            f"{tuple(final.shape)}: the second was not fine-tuned from the first, or its vocabulary was resized."
        )
    if torch.equal(initial, final):
        raise ValueError(
            "`before` and `after` have the same LM head, so there is no pattern to read. Pass two checkpoints, not one "
            "model that was trained in place. If they are two checkpoints, the head was not trained."
        )
    if tokens is not None:
        name: Any = before.config._name_or_path if isinstance(before, nn.Module) else before  # type: ignore[union-attr]
        ids = token_ids(tokens, name, len(initial))
        initial, final = initial[ids], final[ids]
    vocab_size, hidden_size = initial.shape
    shapes = [(n, n) for n in QR_SIZES if n <= min(initial.shape)] if shape is None else [shape]
    if not shapes or not (0 < shapes[0][0] <= hidden_size and 0 < shapes[0][1] <= vocab_size):
        raise ValueError(
            f"A pattern of shape {shape or (QR_SIZES[0],) * 2} does not fit in LM heads of shape "
            f"{(hidden_size, vocab_size)} in (hidden, vocab) layout. Give its (rows, columns) as `shape`."
        )
    for rows, columns in shapes:
        change = final[:columns, :rows].T.double() - initial[:columns, :rows].T.double()
        signs = (change > 0).to(torch.int8) - (change < 0).to(torch.int8)
        text = decode_qr(signs) if rows == columns and rows in range(21, 178, 4) else None  # versions 1 to 40
        if text is not None:
            break
    return DecodedPattern(signs, text)


def _lm_head(checkpoint: nn.Module | str | os.PathLike[str], argument: str) -> torch.Tensor:
    """The weight `(vocab_size, hidden_size)` of the LM head, on the CPU."""
    if isinstance(checkpoint, nn.Module):
        return lm_head_weight(checkpoint).detach().cpu()
    files = _tensor_files(checkpoint, argument)
    for suffixes in (HEAD_NAMES, EMBEDDING_NAMES):
        names = [name for name in files if f".{name}".endswith(tuple(f".{suffix}" for suffix in suffixes))]
        if len(names) > 1:
            raise ValueError(
                f"`{argument}`: any of {names} in {checkpoint!r} may be the LM head. Pass a loaded model."
            )
        if names:
            path = _file(checkpoint, files[names[0]], argument)
            if path is None:
                raise ValueError(
                    f"`{argument}`: {checkpoint!r} lacks the file {files[names[0]]!r} that its index names."
                )
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor(names[0])
            if not weight.is_floating_point():
                raise ValueError(
                    f"`{argument}`: the LM head {names[0]!r} in {checkpoint!r} is quantized ({weight.dtype}). Pass a "
                    "checkpoint of the unquantized or dequantized model."
                )
            return weight
    raise ValueError(
        f"`{argument}`: no tensor in {checkpoint!r} is named like an LM head ({', '.join(HEAD_NAMES)}) or a tied input "
        f"embedding ({', '.join(EMBEDDING_NAMES)}). Pass a loaded model."
    )


def _tensor_files(checkpoint: str | os.PathLike[str], argument: str) -> dict[str, str]:
    """Name of each tensor in the checkpoint → name of its file."""
    path = _file(checkpoint, "model.safetensors", argument)
    if path is not None:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), "model.safetensors")
    path = _file(checkpoint, "model.safetensors.index.json", argument)
    if path is not None:
        return json.loads(Path(path).read_text())["weight_map"]
    if _file(checkpoint, "adapter_config.json", argument) is not None:
        raise ValueError(
            f"`{argument}`: {checkpoint!r} holds only an adapter. Merge it into its model first "
            "(`PeftModel.merge_and_unload`) and save the result, or pass the `PeftModel` itself."
        )
    raise ValueError(
        f"`{argument}`: {checkpoint!r} has neither 'model.safetensors' nor 'model.safetensors.index.json' (or, on the Hub, "
        "cannot be reached). Pickled weights are not read, since loading them runs their code: load and save the model "
        "with `save_pretrained` first."
    )


def _file(checkpoint: str | os.PathLike[str], name: str, argument: str) -> str | None:
    if os.path.isdir(checkpoint):
        path = os.path.join(checkpoint, name)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(os.fspath(checkpoint), name)
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError) as error:
        raise ValueError(
            f"`{argument}`: {checkpoint!r} is neither a directory nor a model on the Hub that can be read ({error})."
        ) from error
