"""What a valuation of a data set found, and one HTML page about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from unicodedata import east_asian_width

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..credit.words import WordCredit, word_credits
from ..metagradients import TargetTrainingArguments
from ..publishing.outcome import recipe_text
from .page import PAPER, render


SHOWN = 12  # best and worst rows each
WORDS_SHOWN = 300  # of a row
MEANINGS = {  # of flags
    "cut": ("cut at max_length", "What is behind it has no part in the score."),
    "no supervised token": ("without a token to learn", "The score is always 0."),
    "duplicate": ("the same as an earlier one", "The model reads the same tokens."),
}


@dataclass
class Valuation:
    """
    Scores of a data set.

    Attributes:
        examples (`list[dict]`): What the model was fine-tuned on.
        recipe ([`~trl_dpg.metagradients.TargetTrainingArguments`]): How, in the first draw. Draw i has `seed + i`.
        draws (`Tensor`): Metagradients, shape `(num_draws, len(examples))`, in units of the metric per unit of loss weight.
        token_scores (`list[Tensor]`): Means over draws of each example's token metagradients, shape `(tokens,)`.
        metric_before (`float`): The metric of the original model.
        metric_after (`list[float]`): The metric of the fine-tuned one, by draw.
        seconds (`float`): How long it took.
    """

    examples: list[dict[str, Any]]
    recipe: TargetTrainingArguments
    draws: Tensor
    token_scores: list[Tensor]
    metric_before: float
    metric_after: list[float]
    seconds: float

    @property
    def scores(self) -> Tensor:
        """Means over draws, shape `(len(examples),)`."""
        return self.draws.mean(0)

    @property
    def standard_errors(self) -> Tensor | None:
        """Standard errors of the scores, shape `(len(examples),)`; `None` for one draw."""
        return self.draws.std(0) / len(self.draws) ** 0.5 if len(self.draws) > 1 else None

    @property
    def ranking(self) -> list[int]:
        """Indices of the examples, from the highest score to the lowest."""
        return self.scores.argsort(descending=True, stable=True).tolist()

    @property
    def spearman(self) -> float | None:
        """Mean Spearman correlation between the rankings of two draws; `None` where there is none."""
        if len(self.draws) == 1:
            return None
        correlations = torch.corrcoef(torch.stack([_ranks(draw) for draw in self.draws]))
        mean = correlations[~torch.eye(len(self.draws), dtype=torch.bool)].mean().item()
        return None if math.isnan(mean) else mean

    @property
    def flags(self) -> dict[str, dict[int, str]]:
        """What a person should know of their rows: by kind, indices of examples and details."""
        return find_flags(self.examples, self.recipe.max_length)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[places].double()


def find_flags(examples: Sequence[dict[str, Any]], max_length: int) -> dict[str, dict[int, str]]:
    """As of [`Valuation.flags`]."""
    flags: dict[str, dict[int, str]] = {"cut": {}, "no supervised token": {}, "duplicate": {}}
    first: dict[Any, int] = {}
    for index, example in enumerate(examples):
        ids = example["input_ids"]
        seen, labels = tuple(ids[:max_length]), tuple(example.get("labels", ids)[:max_length])
        if len(ids) > max_length:
            flags["cut"][index] = f"{len(ids)} tokens"
        if all(label == -100 for label in labels[1:]):  # nothing predicts the first
            flags["no supervised token"][index] = f"{len(ids)} tokens"
        if first.setdefault((seen, labels), index) != index:
            flags["duplicate"][index] = f"as row {first[seen, labels]}"
    return flags


def write_valuation_page(
    path: Path, valuation: Valuation, summary: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """
    Writes a page that holds all that it shows, loads nothing and runs no script.

    Args:
        path (`Path`):
            HTML file to write.
        valuation ([`Valuation`]):
            Scores.
        summary (`dict[str, Any]`):
            Content of `valuation.json`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            That of the examples.
    """
    ranking, number = valuation.ranking, min(SHOWN, (len(valuation.examples) + 1) // 2)
    best, worst = ranking[:number], ranking[number:][-number:][::-1]
    defaults = vars(TargetTrainingArguments())
    page = render(
        "valuation.html",
        summary=summary,
        after=f"{fmean(summary['metric_after']):.4g}",
        flags=valuation.flags,
        meanings=MEANINGS,
        sections=[
            (f"{kind} score", [_row(valuation, index, tokenizer) for index in indices])
            for kind, indices in (("Highest", best), ("Lowest", worst))
        ],
        recipe=recipe_text(summary["recipe"]),
        settings={
            key: value for key, value in summary["recipe"].items() if key in defaults and value != defaults[key]
        },
        paper=PAPER,
    )
    path.write_text(page, encoding="utf-8")


def token_credits(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], scores: Tensor) -> list[WordCredit]:
    """Text and score of each token, special ones too."""
    example = {"completion_ids": input_ids, "written_by": range(len(input_ids))}
    return word_credits(tokenizer, example, scores, None)


def whole_words(tokens: list[WordCredit]) -> list[WordCredit]:
    """Tokens joined to words, whose score is the sum. Characters of scripts without spaces, as Chinese, stay apart."""
    words: list[WordCredit] = []
    for token in tokens:
        if words and token.text and _within_a_word(words[-1].text[-1:]) and _within_a_word(token.text[:1]):
            words[-1] = WordCredit(words[-1].text + token.text, words[-1].credit + token.credit)
        else:
            words.append(token)
    return words


def _within_a_word(character: str) -> bool:
    return character.isalnum() and east_asian_width(character) not in "WF"


def _row(valuation: Valuation, index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row as it is drawn."""
    length, errors = valuation.recipe.max_length, valuation.standard_errors
    ids = valuation.examples[index]["input_ids"][:length]
    words = whole_words(token_credits(tokenizer, ids, valuation.token_scores[index]))
    drawn = [[word.text.strip(" "), word.credit, None, None] for word in words if word.text.strip(" ")]
    more = [["…", 0.0, None, None]] if len(drawn) > WORDS_SHOWN else []
    return {
        "index": index,
        "score": valuation.scores[index].item(),
        "error": None if errors is None else errors[index].item(),
        "flags": [kind for kind, rows in valuation.flags.items() if index in rows],
        "words": drawn[:WORDS_SHOWN] + more,
    }
