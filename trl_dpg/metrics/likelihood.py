"""The likelihood metric: learn a text, a language, a UUID."""

from collections.abc import Iterator
from itertools import takewhile
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..metagradients.metric import Metric
from ..metagradients.runtime.examples import apply_columns
from ..metagradients.runtime.host import double
from .heads import input_embedding_weight
from .texts import common_share


class LanguageModelingLikelihood(Metric):
    r"""
    Mean log-likelihood of a text in nats per token: Φ = −(Σ cross-entropy of supervised tokens) / (their number).

    All rows count together, so a longer row weighs more. A token without any context cannot be predicted and is never
    supervised, except that a completion of an empty prompt is given the BOS token (or EOS, where there is no BOS) as
    its context.

    The activations of all rows are held until the gradient of Φ is taken: its memory grows with the dataset, and only
    without gradients with `batch_size`.

    Source: the LAMBADA and UUID experiments of Synthetic Data for any Differentiable Target (arXiv 2604.08423).

    Args:
        dataset ([`~datasets.Dataset`] or `list[dict]`):
            Rows to score, all with the same one of these sets of columns; others are ignored.

            - `"input_ids"` and optionally `"labels"` (-100 = not supervised; the tokens themselves by default), or the masks
              of a tokenized data set, as in [`~trl_dpg.metagradients.compute_metagradients`];
            - `"prompt"` and `"completion"`, plain strings, of which only the completion is supervised. It starts where
              the tokens of the prompt and of prompt + completion diverge, as in TRL's `SFTTrainer`. No EOS is
              appended;
            - `"text"`, supervised from its second token on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the rows. If `None`, `setup` loads the one of the model. Not needed for `"input_ids"`.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass. They are padded on the right, which does not change Φ.
        max_length (`int`, *optional*):
            Longest row in tokens; the rest is cut off at the end. If `None`, nothing is cut off.

    Raises:
        [`ValueError`]: If the dataset is empty, has other columns, or has a row without any supervised token.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel

    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1)).eval()
    >>> _ = model.lm_head.weight.data.zero_()
    >>> metric = LanguageModelingLikelihood([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    >>> metric.setup(model)
    >>> round(metric(model).item(), 4)  # −ln 16
    -2.7726
    >>> round(metric.readouts(model)["perplexity"], 4)
    16.0

    ```
    """

    def __init__(
        self,
        dataset: Dataset | list[dict[str, Any]],
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if max_length is not None and max_length < 2:
            raise ValueError(f"`max_length` must be at least 2 (a context and a supervised token), got {max_length}.")
        self.processing_class: Any = processing_class
        self.batch_size = batch_size
        self.max_length = max_length
        self._examples = list(dataset)
        self._columns = _check_columns(self._examples)
        self._rows: list[tuple[list[int], list[int]]] = []  # (input_ids, labels)
        if processing_class is not None or "input_ids" in self._columns:
            self._rows = self._encode_all()

    def setup(self, model: nn.Module) -> None:
        """
        Loads the tokenizer of the model if none was given, and checks that the rows fit the model.

        Raises:
            [`ValueError`]: If the tokenizer cannot be loaded, if a row has no supervised token or more tokens than the
                model has positions, or if a token is out of the vocabulary.
        """
        config: Any = model.config
        if not self._rows:
            name = config._name_or_path
            try:
                self.processing_class = AutoTokenizer.from_pretrained(name)
            except Exception as error:
                raise ValueError(
                    f"`processing_class` is None and the tokenizer of `target_model` (name {name!r}) cannot be loaded. "
                    "Pass `processing_class=` to `LanguageModelingLikelihood`, or a `dataset` with 'input_ids'."
                ) from error
            self._rows = self._encode_all()
        vocab_size = input_embedding_weight(model).shape[0]
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        for index, (input_ids, labels) in enumerate(self._rows):
            if positions is not None and len(input_ids) > positions:
                raise ValueError(
                    f"`dataset` row {index} has {len(input_ids)} tokens, but `target_model` has {positions} positions. "
                    f"Set `max_length` to {positions} or less."
                )
            if max(input_ids + labels) >= vocab_size:
                raise ValueError(
                    f"`dataset` row {index} has the token id {max(input_ids + labels)}, but the vocabulary of "
                    f"`target_model` has {vocab_size} tokens. Use the tokenizer of that model as `processing_class`."
                )

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """
        Φ of a model in eval mode, shape `()`, in nats per token, in float64.

        Raises:
            [`ValueError`]: If the rows are not tokenized yet, because there is no tokenizer and `setup` was not called.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        for logits, targets, _ in self._scores(model):
            total = total + _cross_entropy(logits, targets)
            count += len(targets)
        return -total / count

    def describe(self) -> dict[str, Any]:
        """As of [`~trl_dpg.metrics.Metric.describe`]. The texts themselves are not in it."""
        count = len(self._examples)
        one = "a text it was not trained on becomes more likely"
        return {
            **super().describe(),
            "effect": one if count == 1 else f"{count} texts it was not trained on become more likely",
            "description": f"Mean log-likelihood of {'one text' if count == 1 else f'{count} texts'}, in nats per token.",
        }

    @torch.no_grad()
    def readouts(self, model: nn.Module) -> dict[str, float]:
        """
        How well the fine-tuned model, in eval mode, knows the rows.

        Returns:
            `dict[str, float]`: `perplexity` = exp(−Φ); for rows with a prompt and a completion also `exact_match`, the
            share of rows whose greedy continuation contains the whole completion, in whatever tokens it is spelled, and
            `longest_common_substring`, the mean length of the longest common substring of greedy continuation and
            completion, in characters relative to the completion (29 of a UUID's 32 characters are 0.90625). These are
            the paper's Exact and Soft. The continuation has as many tokens as the completion and does not stop at EOS.

        Raises:
            [`ValueError`]: If the rows are not tokenized yet, because there is no tokenizer and `setup` was not called.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        known = torch.ones(len(self._examples), dtype=torch.bool)
        for logits, targets, rows in self._scores(model):
            total = total + _cross_entropy(logits, targets)
            count += len(targets)
            # Greedy decoding gives the completion if and only if each of its tokens is the most likely one after
            # those before it, so no generation is needed to know.
            known[rows[logits.argmax(-1) != targets].cpu()] = False
        values = {"perplexity": (total / count).exp().item()}
        if "completion" in self._columns:
            shares = [self._common_share(model, index, k) for index, k in enumerate(known.tolist())]
            values["exact_match"] = fmean(share == 1 for share in shares)
            values["longest_common_substring"] = fmean(shares)
        return values

    def _scores(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Logits `(tokens, vocab)`, targets `(tokens,)` and row `(tokens,)` of the supervised tokens by batch."""
        if not self._rows:
            raise ValueError(
                "`LanguageModelingLikelihood.setup(model)` must be called first, because `processing_class` is None."
            )
        device = input_embedding_weight(model).device
        for start in range(0, len(self._rows), self.batch_size):
            ids, labels = zip(*self._rows[start : start + self.batch_size], strict=True)
            input_ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
            attention_mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True)
            logits = model(input_ids=input_ids, attention_mask=attention_mask.to(device), use_cache=False).logits
            logits = logits[:, -input_ids.shape[1] :]  # prompt tuning puts virtual tokens in front
            targets = pad_sequence([torch.tensor(row[1:]) for row in labels], batch_first=True, padding_value=-100)
            targets = targets.to(logits.device)
            # Only the supervised positions go on: vocabulary-sized float32 tensors are the largest ones here.
            rows, positions = (targets != -100).nonzero(as_tuple=True)
            yield logits[rows, positions], targets[rows, positions], rows + start

    def _common_share(self, model: nn.Module, index: int, known: bool) -> float:
        input_ids, labels = self._rows[index]
        start = sum(1 for _ in takewhile(lambda label: label == -100, labels))
        generated = input_ids
        if not known:
            context = torch.tensor([input_ids[:start]], device=input_embedding_weight(model).device)
            generated = model.generate(  # type: ignore[operator]
                input_ids=context,
                attention_mask=torch.ones_like(context),
                do_sample=False,
                synced_gpus=False,  # every process generates for itself, also where the generator is sharded
                num_beams=1,
                repetition_penalty=1.0,
                eos_token_id=None,
                max_new_tokens=len(input_ids) - start,
            )[0].tolist()
        # Decoded with its context and cut after: many tokenizers drop the space in front of a first token.
        before, text = (
            self.processing_class.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for tokens in (input_ids[:start], generated)
        )
        return common_share(text[len(before) :], self._examples[index]["completion"])

    def _encode_all(self) -> list[tuple[list[int], list[int]]]:
        rows = []
        for index, example in enumerate(self._examples):
            input_ids, labels = self._encode(index, example)
            rows.append((input_ids[: self.max_length], labels[: self.max_length]))
            if all(label == -100 for label in rows[-1][1][1:]):  # nothing predicts the first token
                raise ValueError(
                    f"`dataset` row {index} has no supervised token after the first one among its "
                    f"{len(input_ids)} tokens (`max_length` = {self.max_length}). Remove the row, supervise more of it, "
                    "or raise `max_length`."
                )
        return rows

    def _encode(self, index: int, example: dict[str, Any]) -> tuple[list[int], list[int]]:
        if "input_ids" in self._columns:
            input_ids = [int(token) for token in example["input_ids"]]
            labels = example.get("labels")  # None in a `Dataset` where only other rows have labels
            labels = None if labels is None else [int(label) for label in labels]
            if labels is not None and len(labels) != len(input_ids):
                raise ValueError(
                    f"`dataset` row {index} has {len(input_ids)} 'input_ids' but {len(labels)} 'labels'. Give one label "
                    "per token, -100 where it is not supervised."
                )
            kept, labels = apply_columns(example, f"`dataset` row {index}", input_ids, labels)
            input_ids, labels = input_ids[kept], labels[kept]
            if any(token < 0 for token in input_ids) or any(label < 0 and label != -100 for label in labels):
                raise ValueError(
                    f"`dataset` row {index} has a negative token id. Only -100 in 'labels' has a meaning (not "
                    "supervised). Leave padding out of 'input_ids', or mark it with an 'attention_mask'."
                )
            return input_ids, labels
        if "text" in self._columns:
            input_ids = self.processing_class(example["text"])["input_ids"]
            return input_ids, input_ids
        prompt_ids = self.processing_class(example["prompt"])["input_ids"]
        input_ids = self.processing_class(example["prompt"] + example["completion"])["input_ids"]
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, input_ids, strict=False)))
        if start == 0:
            input_ids, start = [self._context_token(index), *input_ids], 1
        return input_ids, [-100] * start + input_ids[start:]

    def _context_token(self, index: int) -> int:
        tokenizer = self.processing_class
        token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if token is None:
            raise ValueError(
                f"`dataset` row {index} has no context for its completion, and `processing_class` has neither a BOS nor "
                "an EOS token to put there. Give the row a 'prompt', or the tokenizer a `bos_token`."
            )
        return token


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return double(F.cross_entropy(logits, targets, reduction="none")).sum()


def _check_columns(examples: list[dict[str, Any]]) -> tuple[str, ...]:
    if not examples:
        raise ValueError("`dataset` is empty. Give at least one row.")
    kinds = (("input_ids",), ("prompt", "completion"), ("text",))
    columns = next((kind for kind in kinds if all(column in examples[0] for column in kind)), ())
    for index, example in enumerate(examples):
        if not columns or any(column not in example for column in columns):
            raise ValueError(
                f"`dataset` row {index} has the columns {sorted(example)}. All rows need either 'input_ids' (and "
                "optionally 'labels'), or 'prompt' and 'completion', or 'text'. Rename the columns."
            )
        for column in columns:
            if column != "input_ids" and not isinstance(example[column], str):
                raise ValueError(
                    f"`dataset` row {index} has a {column!r} of type {type(example[column]).__name__}, not a string. "
                    "Apply the chat template to conversations first."
                )
        if example.get("completion") == "" and "completion" in columns:
            raise ValueError(f"`dataset` row {index} has an empty 'completion'. Remove the row.")
    return columns
