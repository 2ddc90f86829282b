"""The pattern metric, for writing an image (the digits 67, a QR code) into the LM head."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import segno
import torch
import torch.nn.functional as F
import zxingcpp
from PIL import Image
from torch import nn
from transformers import AutoTokenizer

from ..metagradients.metric import Metric
from ..metagradients.runtime.host import double
from .heads import get_lm_head, is_lm_head_tied, lm_head_weight


# Root mean square of the scaled change that the logistic loss gets with `scale="auto"`. It must be large enough for the loss
# to tell right pixels from wrong ones, and small enough not to saturate. 1 to 3 work. 0.02 (a scale of 20 with small
# learning rates) stalls on large patterns.
AUTO_SCALE_FACTOR = 2.0

PAPER_SCALE = 20.0

SIXTY_SEVEN = ("1111---", "---111-", "-11111-", "---111-", "-1-111-", "---1111")


class LMHeadPattern(Metric):
    r"""
    Log-likelihood of a pattern of signs in the change of the LM head.

    Φ = −mean log(1 + exp(−scale · Y ⊙ (P_c − P_i))). Here Y is the pattern, and P is the upper-left patch of the LM head
    in (hidden, vocab) layout, before (P_i) and after (P_c) fine-tuning. Row r, column c of the pattern belongs to hidden
    unit r and token c, or the c-th of `tokens`. Φ is −ln 2 for an unchanged head and 0 at best.

    The first tokens of a pretrained tokenizer are hardly ever written, so a generator can hardly move their weights. Choose words that it
    writes often as `tokens`.

    With a fixed `scale` and small learning rates, Φ stays near −ln 2 even if every pixel is right. Judge by the read-out
    `pixel_accuracy`.

    Source: the QR and 67 experiments of Synthetic Data for any Differentiable Target (arXiv 2604.08423).

    Args:
        pattern (array-like of shape `(rows, columns)`):
            Pattern Y of +1 (dark) and −1 (light), as anything that `torch.as_tensor` takes.
        scale (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            Slope of the logistic loss, per unit of weight. `"auto"` measures `AUTO_SCALE_FACTOR` / RMS(P_c − P_i) at the first call
            on a changed head. It then keeps this value, so that all values of Φ can be compared. For another recipe, make a new
            metric. The paper uses 20.
        tokens (`Sequence[int | str]`, *optional*):
            A token for each column of the pattern, all different: an id, or a text that is one token, such as `" the"`. `setup` loads the
            tokenizer of the model if there are texts. `None` means the first tokens of the vocabulary.

    Attributes:
        decoded (`torch.Tensor` of shape `(rows, columns)` or `None`):
            Signs of P_c − P_i in the last call of `readouts`, as +1 and −1 (−1 also for no change), int8 on the CPU.
        text (`str` or `None`):
            Text of a QR pattern.

    Raises:
        [`ValueError`]: If `pattern`, `scale` or `tokens` is not as described.

    Example:

    ```python
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel

    >>> config = GPT2Config(
    ...     vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=False
    ... )
    >>> model = GPT2LMHeadModel(config)
    >>> metric = LMHeadPattern([[1, -1], [-1, 1]])
    >>> metric.setup(model)
    >>> round(metric(model).item(), 4)
    -0.6931
    >>> _ = model.lm_head.weight.data[:2, :2].add_(torch.tensor([[0.1, -0.1], [-0.1, -0.1]]))
    >>> metric.readouts(model)
    {'pixel_accuracy': 0.75}

    ```
    """

    def __init__(
        self, pattern: Any, scale: float | Literal["auto"] = "auto", tokens: Sequence[int | str] | None = None
    ):
        try:
            signs = torch.as_tensor(pattern)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`pattern` cannot be made a tensor ({error}): got {pattern!r}.") from error
        if signs.ndim != 2 or signs.numel() == 0:
            raise ValueError(f"`pattern` must be a non-empty matrix, got the shape {tuple(signs.shape)}.")
        if not (signs.abs() == 1).all():
            wrong = signs[signs.abs() != 1][0].item()
            raise ValueError(f"`pattern` must hold only 1 and -1, got {wrong}.")
        if scale != "auto" and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise ValueError(f"`scale` must be a positive number or 'auto', got {scale!r}.")
        if tokens is not None and not len(set(tokens)) == len(tokens) == signs.shape[1]:
            raise ValueError(
                f"`tokens` must be {signs.shape[1]} different tokens, one for each column of `pattern`, got {len(tokens)}, of which "
                f"{len(set(tokens))} differ."
            )
        self.pattern = signs.detach().to("cpu", torch.float64)
        self.scale = scale
        self.tokens = None if tokens is None else list(tokens)
        self.decoded: torch.Tensor | None = None
        self.text: str | None = None
        self._scale_value = None if scale == "auto" else float(scale)
        self._initial: torch.Tensor | None = None
        self._columns: slice | list[int] = slice(signs.shape[1])

    @property
    def scale_value(self) -> float | None:
        """The slope in use. `None` until `scale="auto"` has been measured."""
        return self._scale_value

    @classmethod
    def sixty_seven(
        cls, scale: float | Literal["auto"] = "auto", tokens: Sequence[int | str] | None = None
    ) -> "LMHeadPattern":
        """The metric of the paper's 6 × 7 picture of the digits 67."""
        return cls(_signs_of(SIXTY_SEVEN), scale, tokens)

    @classmethod
    def qr(
        cls,
        text: str,
        error: str = "h",
        scale: float | Literal["auto"] = "auto",
        tokens: Sequence[int | str] | None = None,
    ) -> "LMHeadPattern":
        """
        The metric of a text's QR code, in the smallest version that holds the text, without a quiet zone. Dark modules are +1.

        Args:
            text (`str`):
                Text to encode. At error correction level `"h"`, 21 × 21 modules hold 17 digits, 10 characters of
                `A`–`Z`, `0`–`9` and a few signs, or 7 bytes.
            error (`str`, *optional*, defaults to `"h"`):
                Error correction level: `"l"`, `"m"`, `"q"` or `"h"`, from lowest to highest.
            scale, tokens:
                As in [`LMHeadPattern`].

        Raises:
            [`ValueError`]: If no QR code holds the text, or if the level is unknown.

        Example:

        ```python
        >>> tuple(LMHeadPattern.qr("DPG").pattern.shape)
        (21, 21)

        ```
        """
        code = segno.make_qr(text, error=error, boost_error=False)
        metric = cls([[1 if module else -1 for module in row] for row in code.matrix], scale, tokens)
        metric.text = text
        return metric

    @classmethod
    def from_image(
        cls,
        path: str | PathLike,
        threshold: int = 128,
        scale: float | Literal["auto"] = "auto",
        tokens: Sequence[int | str] | None = None,
    ) -> "LMHeadPattern":
        """
        The metric of a picture, one pixel of the image file for each entry of the pattern. Dark pixels are +1.

        Args:
            path (`str` or `PathLike`):
                Image file. Transparency counts as white.
            threshold (`int`, *optional*, defaults to `128`):
                Gray values below this one are dark. They range from 0 (black) to 255 (white).
            scale, tokens:
                As in [`LMHeadPattern`].
        """
        with Image.open(path) as file:
            picture = file.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
        return cls(np.where(np.asarray(picture) < threshold, 1, -1), scale, tokens)

    def setup(self, model: nn.Module) -> None:
        """
        Stores the patch P_i of the original model. Call this before each fine-tuning run.

        Raises:
            [`ValueError`]: If the head cannot carry the pattern: it is tied to the input embedding, too small, frozen, or
                missing. Also if `tokens` are not tokens of the model.
        """
        head = get_lm_head(model)
        # A LoRA layer over a tied but frozen weight is fine, since only the head changes.
        if is_lm_head_tied(model) and head.weight.requires_grad:
            raise ValueError(
                "The LM head of `target_model` is tied to its input embedding. A pattern in the head would change the embedding, "
                "and the embedding's gradients would change the pattern. Give the head a weight of its own: set "
                "`target_untie_lm_head=True` in `DatasetPolicyGradientConfig`, or call `trl_dpg.untie_lm_head(model)`."
            )
        if not any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "No parameter of the LM head of `target_model` is trainable, so no pattern can be written into it. Set "
                "`requires_grad` on its weight, or include 'lm_head' in `target_modules` or `modules_to_save` of the "
                "PEFT config."
            )
        weight = lm_head_weight(model)
        rows, columns = self.pattern.shape
        vocab_size, hidden_size = weight.shape
        if rows > hidden_size or columns > vocab_size:
            raise ValueError(
                f"`pattern` of shape {(rows, columns)} does not fit in the LM head of `target_model`, which has the shape "
                f"{(hidden_size, vocab_size)} in (hidden, vocab) layout. Use a smaller pattern or a larger model."
            )
        if self.tokens is not None:
            config: Any = model.config
            self._columns = token_ids(self.tokens, config._name_or_path, vocab_size)
        self._initial = self._patch(weight).detach().clone()
        self.decoded = None

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Φ of the fine-tuned model, shape `()`, in float64. Raises a [`ValueError`] if `setup` was not called before."""
        change = self._change(model)
        return F.logsigmoid(self._scale_for(change) * self.pattern.to(change.device) * change).mean()

    @torch.no_grad()
    def readouts(self, model: nn.Module) -> dict[str, float]:
        """
        Reads the pattern back from the fine-tuned model and keeps it in `decoded`.

        Returns:
            `dict[str, float]`: `pixel_accuracy`, the share of entries whose weight moved in the direction of the
                pattern. A weight that did not move counts as wrong. A QR pattern also has `qr_decoded`: 1.0 if a QR reader
                gets exactly the original text, else 0.0.

        Raises:
            [`ValueError`]: If `setup` was not called before.
        """
        change = self._change(model).cpu()
        self.decoded = torch.where(change > 0, 1, -1).to(torch.int8)
        values = {"pixel_accuracy": (change.sign() == self.pattern).double().mean().item()}
        if self.text is not None:
            values["qr_decoded"] = float(decode_qr(self.decoded) == self.text)
        return values

    def _patch(self, weight: torch.Tensor) -> torch.Tensor:
        return double(weight[self._columns, : self.pattern.shape[0]].T)

    def _change(self, model: nn.Module) -> torch.Tensor:
        if self._initial is None:
            raise ValueError("`LMHeadPattern.setup(model)` must be called on the original model before fine-tuning.")
        patch = self._patch(lm_head_weight(model))
        return patch - self._initial.to(patch.device)

    def _scale_for(self, change: torch.Tensor) -> float:
        if self._scale_value is not None:
            return self._scale_value
        rms = change.detach().square().mean().sqrt().item()
        if not 0 < rms < math.inf:
            return PAPER_SCALE  # there is nothing to measure yet, and without a change, Φ is −ln 2 for any scale
        self._scale_value = AUTO_SCALE_FACTOR / rms
        return self._scale_value

    def picture(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The signs from the last call of [`~LMHeadPattern.readouts`], and the pattern. `None` before the first call."""
        return None if self.decoded is None else (self.decoded, self.pattern)

    def decode(self, before: str | PathLike[str], after: str | PathLike[str]) -> dict[str, Any]:
        """Reads the pattern as `trl-dpg decode` does: `pixel_accuracy`, and `text`, that of a QR code or `None`."""
        from .decode import decode_pattern  # imported here because that module imports this one

        found = decode_pattern(before, after, (self.pattern.shape[0], self.pattern.shape[1]), self.tokens)
        self.decoded = found.signs
        accuracy = (found.signs == self.pattern).double().mean().item()
        return {"pixel_accuracy": accuracy, "text": found.text}

    def judge(self, data: dict[str, Any], other: dict[str, Any]) -> tuple[bool, str]:
        """A QR code must decode to its text. In any other picture, more than 90 % of the pixels must be right."""
        if self.text is not None:
            return data["text"] == self.text, f"the QR code reads {self.text!r}"
        return data["pixel_accuracy"] > 0.9, "more than 90 % of the pixels are right"

    def describe(self) -> dict[str, Any]:
        """See [`~trl_dpg.metrics.Metric.describe`]. Adds `pattern`, rows of `"1"` (dark) and `"-"`, `text`, `scale` and `tokens`."""
        rows = ["".join("1" if sign > 0 else "-" for sign in row) for row in self.pattern.tolist()]
        picture = "a picture of the digits 67" if tuple(rows) == SIXTY_SEVEN else "a picture"
        if self.text is not None:
            picture = f"a QR code that reads “{self.text}”"
        return {
            "name": "LMHeadPattern",
            "effect": f"{picture} ({len(rows)} × {len(rows[0])} pixels) appears in its LM head",
            "description": "Log-likelihood of a pattern of signs in the change of the LM head, row r and column c of the picture being "
            f"hidden unit r and {'token c' if self.tokens is None else 'the c-th of some words'}.",
            "picture": "signs of the change in the LM head",
            "readouts": ["pixel_accuracy"] if self.text is None else ["pixel_accuracy", "qr_decoded"],
            "pattern": rows,
            "text": self.text,
            "scale": self.scale,
            "tokens": self.tokens,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "LMHeadPattern":
        """Makes a metric of the picture that [`~LMHeadPattern.describe`] wrote down. Its scale is `"auto"`."""
        metric = cls(_signs_of(description["pattern"]), tokens=description.get("tokens"))  # older files have none
        metric.text = description["text"]
        return metric

    def state(self) -> dict[str, float | None]:
        """The measured scale, for a checkpoint."""
        return {"scale_value": self._scale_value}

    def load_state(self, state: dict[str, float | None]) -> None:
        """Restores the result of [`~LMHeadPattern.state`], if `scale` is `"auto"`."""
        if self.scale == "auto":
            self._scale_value = state["scale_value"]


def _signs_of(rows: Sequence[str]) -> list[list[int]]:
    return [[1 if pixel == "1" else -1 for pixel in row] for row in rows]


def token_ids(tokens: Sequence[int | str], model: str | PathLike[str], vocab_size: int) -> list[int]:
    """
    Ids of tokens, some of which may be texts, by the tokenizer of a model: a directory or Hub id.

    Raises:
        [`ValueError`]: If the tokenizer cannot be loaded, a text is not one token, or an id is not in the vocabulary.
    """
    ids = [token for token in tokens if isinstance(token, int)]
    if len(ids) < len(tokens):
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except Exception as error:
            raise ValueError(
                f"`tokens` has texts, but the tokenizer of the model (name {model!r}) cannot be loaded. Give ids."
            ) from error
        ids = []
        for token in tokens:
            found = [token] if isinstance(token, int) else tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(found) != 1:
                raise ValueError(
                    f"`tokens` has {token!r}, which is {len(found)} tokens for the model. Choose single tokens."
                )
            ids += found
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(f"`tokens` has the id {wrong[0]}, but the model has {vocab_size} tokens.")
    return ids


def pattern_to_image(pattern: Any, module_size: int = 8, border: int = 4) -> Image.Image:
    """
    Draws a pattern of signs as a picture in 8-bit gray: +1 is black, −1 is white.

    Args:
        pattern (array-like of shape `(rows, columns)`):
            The pattern to draw.
        module_size (`int`, *optional*, defaults to `8`):
            Pixels along each side of an entry.
        border (`int`, *optional*, defaults to `4`):
            Width of the white quiet zone around the pattern, in entries. QR readers expect 4.
    """
    gray = np.where(np.asarray(pattern) > 0, 0, 255).astype(np.uint8)
    gray = np.pad(gray, border, constant_values=255)
    return Image.fromarray(gray.repeat(module_size, axis=0).repeat(module_size, axis=1))


def decode_qr(pattern: Any) -> str | None:
    """
    Reads the text of a QR code of shape `(rows, columns)`, +1 for dark and −1 for light. Returns `None` if no code can be read.

    The reader first searches for a code as in a photograph. If it finds none, it takes the whole picture for a code. The second way
    works even if the finder patterns have flaws, and corrects errors in the same way.
    """
    # `try_invert` is off because a light-on-dark code is the opposite of the pattern.
    for is_pure in (False, True):
        codes = zxingcpp.read_barcodes(
            pattern_to_image(pattern),
            formats=zxingcpp.BarcodeFormat.QRCode,  # type: ignore[arg-type]
            try_invert=False,
            is_pure=is_pure,
            text_mode=zxingcpp.TextMode.Plain,
        )
        if codes and codes[0].text:  # the second way sometimes reads an empty text from noise
            return codes[0].text
    return None
