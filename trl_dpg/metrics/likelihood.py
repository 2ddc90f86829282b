"""The likelihood metric, for learning a text, a language or a UUID, and perplexity, for conditions."""

from collections.abc import Sequence
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
from ..metagradients.runtime.host import double, float64_device
from .heads import input_embedding_weight
from .texts import common_share


Row = tuple[list[int], list[int]]  # (input_ids, labels)


class LanguageModelingLikelihood(Metric):
    r"""
    Mean log-likelihood of a text in nats per token: Φ = −(Σ cross-entropy of supervised tokens) / (their number).

    The mean is over the tokens of all rows, so a longer row weighs more. The first token of a row has no context, so it is never
    supervised. A completion of an empty prompt gets the BOS token (or EOS, if there is no BOS) as its context.

    Memory holds the activations of all rows until the gradient of Φ is computed. So the memory of a gradient grows with the dataset.
    Without a gradient, memory depends on `batch_size` alone.

    Source: the LAMBADA and UUID experiments of Synthetic Data for any Differentiable Target (arXiv 2604.08423).

    Args:
        dataset ([`~datasets.Dataset`] or `list[dict]`):
            Rows to score. All rows have the columns of one of these formats. Other columns are ignored.

            - `"input_ids"` and optionally `"labels"` (-100 = not supervised; the tokens themselves by default), or the masks
              of a tokenized data set, as in [`~trl_dpg.metagradients.compute_metagradients`].
            - `"prompt"` and `"completion"`, as plain strings. Only the completion is supervised. It starts where
              the tokens of the prompt and of prompt + completion diverge, as in TRL's `SFTTrainer`. No EOS is appended.
            - `"text"`, supervised from its second token on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the rows. If `None`, `setup` loads the tokenizer of the model. Not needed for `"input_ids"`.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass. They are padded on the right, which does not change Φ.
        max_length (`int`, *optional*):
            Most tokens of a row. Later tokens are cut off. If `None`, nothing is cut off.

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
        check_sizes(batch_size, max_length)
        self.processing_class: Any = processing_class
        self.batch_size = batch_size
        self.max_length = max_length
        self._examples = list(dataset)
        self._columns = _check_columns(self._examples)
        self._rows: list[Row] = []
        if processing_class is not None or "input_ids" in self._columns:
            self._rows = self._encode_all()

    def setup(self, model: nn.Module) -> None:
        """
        Loads the tokenizer of the model if none was given, and checks that the rows fit the model.

        Raises:
            [`ValueError`]: If the tokenizer cannot be loaded. Also if a row has no supervised token, more tokens than the
                model has positions, or a token that is not in the vocabulary.
        """
        if not self._rows:
            self.processing_class = load_processing_class(model, self, ", or a `dataset` with 'input_ids'")
            self._rows = self._encode_all()
        check_rows(model, self._rows, [f"`dataset` row {index}" for index in range(len(self._rows))])

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """
        Φ of a model in eval mode, shape `()`, in nats per token, in float64.

        Raises:
            [`ValueError`]: If the rows are not tokenized yet, because there is no tokenizer and `setup` was not called.
        """
        log_likelihoods, _ = self._score(model)
        return log_likelihoods.sum() / self._num_supervised()

    def describe(self) -> dict[str, Any]:
        """See [`~trl_dpg.metrics.Metric.describe`]. The description does not contain the texts themselves."""
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
        Measures how well the fine-tuned model, in eval mode, knows the rows.

        Returns:
            `dict[str, float]`: `perplexity` = exp(−Φ). Rows with a prompt and a completion have two more read-outs, which compare the
            characters of the completion with the greedy continuation of the prompt. `exact_match` is the share of rows whose
            continuation contains the whole completion. `longest_common_substring` is the mean length of the longest common
            substring, relative to the completion (29 of a UUID's 32 characters are 0.90625). The paper calls them Exact and Soft.
            The continuation has as many tokens as the completion, and does not stop at EOS.

        Raises:
            [`ValueError`]: If the rows are not tokenized yet, because there is no tokenizer and `setup` was not called.
        """
        log_likelihoods, known = self._score(model)
        values = {"perplexity": (-log_likelihoods.sum() / self._num_supervised()).exp().item()}
        if "completion" in self._columns:
            shares = [self._common_share(model, index, k) for index, k in enumerate(known.tolist())]
            values["exact_match"] = fmean(share == 1 for share in shares)
            values["longest_common_substring"] = fmean(shares)
        return values

    def _score(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._rows:
            raise ValueError(
                f"`{type(self).__name__}.setup(model)` must be called first, because `processing_class` is None."
            )
        return score_rows(model, self._rows, self.batch_size)

    def _num_supervised(self) -> int:
        return sum(label != -100 for _, labels in self._rows for label in labels[1:])

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
                synced_gpus=False,  # each process generates alone, even if the generator is sharded
                num_beams=1,
                repetition_penalty=1.0,
                eos_token_id=None,
                max_new_tokens=len(input_ids) - start,
            )[0].tolist()
        # The text is decoded with its context, which is then cut off, since many tokenizers drop the space before a first token.
        before, text = (
            self.processing_class.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for tokens in (input_ids[:start], generated)
        )
        return common_share(text[len(before) :], self._examples[index]["completion"])

    def _encode_all(self) -> list[Row]:
        rows = []
        for index, example in enumerate(self._examples):
            input_ids, labels = self._encode(index, example)
            rows.append((input_ids[: self.max_length], labels[: self.max_length]))
            if all(label == -100 for label in rows[-1][1][1:]):  # the first token has no context
                raise ValueError(
                    f"`dataset` row {index} has no supervised token after the first one among its "
                    f"{len(input_ids)} tokens (`max_length` = {self.max_length}). Remove the row, supervise more tokens, "
                    "or raise `max_length`."
                )
        return rows

    def _encode(self, index: int, example: dict[str, Any]) -> Row:
        if "input_ids" in self._columns:
            input_ids = [int(token) for token in example["input_ids"]]
            labels = example.get("labels")  # a `Dataset` has None here if only other rows have labels
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
                    f"`dataset` row {index} has a negative token id. The only negative value allowed is -100 in 'labels' (not "
                    "supervised). Leave padding out of 'input_ids', or mark it with an 'attention_mask'."
                )
            return input_ids, labels
        if "text" in self._columns:
            input_ids = self.processing_class(example["text"])["input_ids"]
            return input_ids, input_ids
        from trl.data_utils import common_prefix_length  # imported here since other metrics do not need TRL

        prompt_ids = self.processing_class(example["prompt"])["input_ids"]
        input_ids = self.processing_class(example["prompt"] + example["completion"])["input_ids"]
        start = common_prefix_length(prompt_ids, input_ids)
        if start == 0:
            input_ids, start = [self._context_token(index), *input_ids], 1
        return input_ids, [-100] * start + input_ids[start:]

    def _context_token(self, index: int) -> int:
        tokenizer = self.processing_class
        token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if token is None:
            raise ValueError(
                f"`dataset` row {index} has no context for its completion, and `processing_class` has neither a BOS nor "
                "an EOS token to use as context. Give the row a 'prompt', or the tokenizer a `bos_token`."
            )
        return token


class Perplexity(LanguageModelingLikelihood):
    """
    Perplexity of texts, for a condition such as `KeepBelow(Perplexity(texts), factor=1.01)`. As a goal, use `-Perplexity(texts)`.

    Args:
        dataset, processing_class, batch_size, max_length:
            As in [`LanguageModelingLikelihood`].
    """

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Perplexity of a model in eval mode, shape `()`, in float64."""
        return (-super().__call__(model)).exp()

    def describe(self) -> dict[str, Any]:
        """See [`~trl_dpg.metrics.Metric.describe`]. The description does not contain the texts themselves."""
        texts = f"{len(self._examples)} text{'s' if len(self._examples) > 1 else ''}"
        return {
            **super().describe(),
            "effect": f"its perplexity on {texts} rises",
            "description": f"Perplexity of {texts}.",
        }


def check_sizes(batch_size: int, max_length: int | None) -> None:
    """Raises a [`ValueError`] if no row can be scored."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if max_length is not None and max_length < 2:
        raise ValueError(f"`max_length` must be at least 2 (a context and a supervised token), got {max_length}.")


def score_rows(model: nn.Module, rows: Sequence[Row], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scores rows with a model.

    Returns:
        `tuple[Tensor, Tensor]`: For each row, the summed log-likelihood of its supervised tokens in float64, and whether each of
            them is the most likely token there. Shape `(rows,)` each.
    """
    device = input_embedding_weight(model).device
    sums, greedy = [], []
    for start in range(0, len(rows), batch_size):
        ids, labels = zip(*rows[start : start + batch_size], strict=True)
        input_ids = pad_sequence([torch.tensor(row[:-1]) for row in ids], batch_first=True).to(device)
        attention_mask = pad_sequence([torch.ones(len(row) - 1, dtype=torch.long) for row in ids], batch_first=True)
        logits = model(input_ids=input_ids, attention_mask=attention_mask.to(device), use_cache=False).logits
        logits = logits[:, -input_ids.shape[1] :]  # prompt tuning puts virtual tokens in front
        targets = pad_sequence([torch.tensor(row[1:]) for row in labels], batch_first=True, padding_value=-100)
        # Only supervised positions are kept, since float32 tensors of the vocabulary's size take most of the memory.
        supervised = targets != -100
        logits, targets = logits[supervised.to(logits.device)], targets[supervised].to(logits.device)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = double(F.cross_entropy(logits, targets, reduction="none"))
        counts = supervised.sum(1).tolist()
        sums += [-part.sum() for part in losses.split(counts)]
        greedy += [part.all() for part in (logits.argmax(-1) == targets).split(counts)]
    return torch.stack(sums).to(float64_device(device)), torch.stack(greedy).to(device)


def load_processing_class(model: nn.Module, metric: Any, instead: str = "") -> Any:
    """Loads the tokenizer of a target. If that fails, the error says what to pass instead."""
    name = model.config._name_or_path  # type: ignore[union-attr]
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"`processing_class` is None and the tokenizer of `target_model` (name {name!r}) cannot be loaded. "
            f"Pass `processing_class=` to `{type(metric).__name__}`{instead}."
        ) from error


def check_rows(model: nn.Module, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raises a [`ValueError`] for rows that the target cannot read. `names` are the rows' names in messages."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    for (input_ids, labels), name in zip(rows, names, strict=True):
        if positions is not None and len(input_ids) > positions:
            raise ValueError(
                f"{name} has {len(input_ids)} tokens, but `target_model` has {positions} positions. "
                f"Set `max_length` to {positions} or less."
            )
        check_vocabulary(model, input_ids + labels, name)


def check_vocabulary(model: nn.Module, tokens: list[int], name: str) -> None:
    """Raises a [`ValueError`] for a row with a token that is not in the target's vocabulary."""
    vocab_size = input_embedding_weight(model).shape[0]
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"{name} has the token id {max(tokens)}, but the vocabulary of "
            f"`target_model` has {vocab_size} tokens. Use the tokenizer of that model as `processing_class`."
        )


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
