"""The preference metric, for preferring one answer to another."""

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..metagradients.metric import Metric
from .likelihood import Row, check_rows, check_sizes, load_processing_class, score_rows


class PreferenceMargin(Metric):
    r"""
    How much fine-tuning made the target prefer chosen answers to rejected ones, as minus the loss of DPO.

    Φ is the mean over rows of log σ(β [(log π(c) − log π₀(c)) − (log π(r) − log π₀(r))]). Here log π(c) is the log-likelihood of all
    tokens of the chosen answer after the prompt, and π₀ is the untouched target. Φ is −ln 2 before fine-tuning.

    Rows are tokenized as in TRL's `DPOTrainer`, with an EOS token at the end. Memory holds the activations of all answers until the
    gradient of Φ is computed. `setup` measures π₀ before each run, which costs a forward pass without gradients.

    Source: Direct Preference Optimization (arXiv 2305.18290).

    Args:
        dataset ([`~datasets.Dataset`] or `list[dict]`):
            Rows with the columns `"prompt"`, `"chosen"` and `"rejected"`, as plain strings. Other columns are ignored.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the rows. If `None`, `setup` loads the tokenizer of the model.
        beta (`float`, *optional*, defaults to `0.1`):
            β, above 0. With a large β, rows with a good margin soon stop to count, and the others count more.
        batch_size (`int`, *optional*, defaults to `8`):
            Answers per forward pass.
        max_length (`int`, *optional*):
            Most tokens of a prompt with its answer. Later tokens are cut off. If `None`, nothing is cut off.

    Raises:
        [`ValueError`]: If the dataset is empty, lacks a column, or has a row without any token of an answer to predict.

    Example:

    ```python
    >>> from trl_dpg.metrics import PreferenceMargin

    >>> rows = [{"prompt": "The sky is", "chosen": " green.", "rejected": " blue."}]
    >>> PreferenceMargin(rows).describe()["effect"]
    'it prefers the chosen answers of 1 pairs'

    ```
    """

    def __init__(
        self,
        dataset: Dataset | list[dict[str, Any]],
        processing_class: PreTrainedTokenizerBase | None = None,
        beta: float = 0.1,
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        if not 0 < beta < float("inf"):
            raise ValueError(f"`beta` must be a positive number, got {beta}.")
        check_sizes(batch_size, max_length)
        self.processing_class: Any = processing_class
        self.beta, self.batch_size, self.max_length = beta, batch_size, max_length
        self._pairs = list(dataset)
        _check_columns(self._pairs)
        self._rows: list[Row] = []  # chosen answers, then rejected ones
        if processing_class is not None:
            self._rows = self._encode_all()
        self._untouched: torch.Tensor | None = None

    def setup(self, model: nn.Module) -> None:
        """
        Measures the untouched target. Loads its tokenizer if none was given, and checks that the rows fit the target.

        Raises:
            [`ValueError`]: If the tokenizer cannot be loaded. Also if a row has no token to predict, more tokens than the model has
                positions, or a token that is not in the vocabulary.
        """
        if not self._rows:
            self.processing_class = load_processing_class(model, self)
            self._rows = self._encode_all()
        check_rows(model, self._rows, self._names())
        with torch.no_grad():
            self._untouched = self._log_ratios(model)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Φ of a model in eval mode, shape `()`, in float64. Raises a [`ValueError`] if `setup` was not called before."""
        return F.logsigmoid(self._margins(model)).mean()

    @torch.no_grad()
    def readouts(self, model: nn.Module) -> dict[str, float]:
        """`preference_accuracy`, share of rows with a positive margin, and `preference_margin`, the mean margin times β. As in TRL's logs."""
        margins = self._margins(model)
        return {
            "preference_accuracy": (margins > 0).double().mean().item(),
            "preference_margin": margins.mean().item(),
        }

    def _margins(self, model: nn.Module) -> torch.Tensor:
        if self._untouched is None:
            raise ValueError(
                "`PreferenceMargin.setup(model)` must be called on the original model before fine-tuning."
            )
        log_ratios = self._log_ratios(model)
        return self.beta * (log_ratios - self._untouched.to(log_ratios.device))

    def _log_ratios(self, model: nn.Module) -> torch.Tensor:
        """log π(c) − log π(r) of each pair."""
        chosen, rejected = score_rows(model, self._rows, self.batch_size)[0].chunk(2)
        return chosen - rejected

    def describe(self) -> dict[str, Any]:
        """See [`~trl_dpg.metrics.Metric.describe`]. The description does not contain the texts themselves."""
        return {
            **super().describe(),
            "effect": f"it prefers the chosen answers of {len(self._pairs)} pairs",
            "description": f"Mean log-sigmoid of the DPO margin of {len(self._pairs)} pairs of answers, β = {self.beta:g}.",
        }

    def _names(self) -> list[str]:
        return [f"`dataset` row {i}, {side!r}," for side in ("chosen", "rejected") for i in range(len(self._pairs))]

    def _encode_all(self) -> list[Row]:
        pairs = [self._encode(pair) for pair in self._pairs]
        rows = [pair[side] for side in (0, 1) for pair in pairs]
        for (input_ids, labels), name in zip(rows, self._names(), strict=True):
            if all(label == -100 for label in labels[1:]):
                raise ValueError(
                    f"{name} has no token of the answer among its {len(input_ids)} tokens (`max_length` = {self.max_length}). "
                    "Remove the row, or raise `max_length`."
                )
        return rows

    def _encode(self, pair: dict[str, str]) -> list[Row]:
        """Encodes both answers. They start where the tokens of the prompt and of either whole text diverge."""
        from trl.data_utils import common_prefix_length  # imported here since other metrics do not need TRL

        tokenizer = self.processing_class
        prompt = tokenizer(pair["prompt"])["input_ids"]
        eos = tokenizer.eos_token or ""
        texts = [pair[side].removesuffix(eos) + eos for side in ("chosen", "rejected")]
        both = [tokenizer(pair["prompt"] + text)["input_ids"] for text in texts]
        start = min(common_prefix_length(prompt, input_ids) for input_ids in both)
        end = self.max_length
        return [(input_ids[:end], ([-100] * start + input_ids[start:])[:end]) for input_ids in both]


def _check_columns(pairs: list[dict[str, Any]]) -> None:
    if not pairs:
        raise ValueError("`dataset` is empty. Give at least one row.")
    for index, pair in enumerate(pairs):
        for column in ("prompt", "chosen", "rejected"):
            if not isinstance(pair.get(column), str):
                raise ValueError(
                    f"`dataset` row {index} has the columns {sorted(pair)}, and {column!r} is a {type(pair.get(column)).__name__}. "
                    "All rows need 'prompt', 'chosen' and 'rejected' as strings. Apply the chat template to conversations first."
                )
