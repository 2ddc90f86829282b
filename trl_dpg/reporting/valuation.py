"""The result of a valuation of a data set, and an HTML page about it."""

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


SHOWN = 12  # number of best rows, and of worst rows
FEW = 32  # of fewer rows than this, one may well have the effect of all
WORDS_SHOWN = 300  # most words of a row
MEANINGS = {  # for each flag, what it says about a row and what follows
    "cut": ("cut at max_length", "Tokens beyond it have no part in the score."),
    "no supervised token": ("without a token to learn", "The score is always 0."),
    "duplicate": ("the same as an earlier one", "The model reads the same tokens."),
}


@dataclass
class Valuation:
    """
    Scores of a data set.

    Attributes:
        examples (`list[dict]`): The training examples.
        recipe ([`~trl_dpg.metagradients.TargetTrainingArguments`]): Recipe of the first draw. Draw i has the seed `seed + i`.
        draws (`Tensor`): Metagradients, shape `(num_draws, len(examples))`, in units of the metric per unit of loss weight.
        token_scores (`list[Tensor]`):
            Each example's token metagradients, shape `(tokens,)`, in the draws of its score: they sum to it. See [`middle_draws`].
        metric_before (`float`): The metric of the original model.
        metric_after (`list[float]`): The metric of the fine-tuned model in each draw.
        seconds (`float`): Duration in seconds.
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
        """Medians over draws, shape `(len(examples),)`: no single draw can make a score."""
        return self.draws.gather(0, middle_draws(self.draws)).mean(0)

    @property
    def standard_errors(self) -> Tensor | None:
        """
        Standard errors of the scores, shape `(len(examples),)`; `None` for one draw.

        They come from the median distance to the score. In a normal distribution, this is the standard deviation / 1.4826, and a median's
        standard error is 1.2533 times that of a mean.
        """
        if len(self.draws) == 1:
            return None
        distances = (self.draws - self.scores).abs()
        middle = distances.gather(0, middle_draws(distances)).mean(0)
        return 1.2533 * 1.4826 * middle / len(self.draws) ** 0.5

    @property
    def ranking(self) -> list[int]:
        """Indices of the examples, from the highest score to the lowest."""
        return self.scores.argsort(descending=True, stable=True).tolist()

    @property
    def spearman(self) -> float | None:
        """Mean Spearman correlation between the rankings of two draws. `None` for one draw, or if all scores of a draw are equal."""
        if len(self.draws) == 1:
            return None
        correlations = torch.corrcoef(torch.stack([_ranks(draw) for draw in self.draws]))
        mean = correlations[~torch.eye(len(self.draws), dtype=torch.bool)].mean().item()
        return None if math.isnan(mean) else mean

    @property
    def unstable_draws(self) -> int:
        """
        Number of draws whose scores are out of proportion. 0 for fewer than 32 rows, as one of few may have the effect of all.

        In such a draw, one row's score is larger than the metric's whole change, or the scores' standard deviation is more than ten times
        that of the median draw. Its run multiplies small changes from step to step. The scores are true derivatives, but nothing follows
        from them for any change that can be made.
        """
        if len(self.draws[0]) < FEW:
            return 0
        spreads, largest = self.draws.std(1), self.draws.abs().amax(1)
        changes = (torch.tensor(self.metric_after) - self.metric_before).abs()
        return int(((largest > changes) | (spreads > 10 * spreads.median())).sum())

    @property
    def flags(self) -> dict[str, dict[int, str]]:
        """Rows that a person should know about. Maps the kind of a flag to indices of examples and details."""
        return find_flags(self.examples, self.recipe.max_length)


def middle_draws(draws: Tensor) -> Tensor:
    """
    For each example, the two draws whose values are in the middle, shape `(2, len(examples))`; twice the same for an odd number of draws.
    """
    order, count = draws.argsort(0), len(draws)
    return torch.stack([order[(count - 1) // 2], order[count // 2]])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on. Equal values all get the mean of their ranks."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[places].double()


def find_flags(examples: Sequence[dict[str, Any]], max_length: int) -> dict[str, dict[int, str]]:
    """See [`Valuation.flags`]."""
    flags: dict[str, dict[int, str]] = {"cut": {}, "no supervised token": {}, "duplicate": {}}
    first: dict[Any, int] = {}
    for index, example in enumerate(examples):
        ids = example["input_ids"]
        seen, labels = tuple(ids[:max_length]), tuple(example.get("labels", ids)[:max_length])
        if len(ids) > max_length:
            flags["cut"][index] = f"{len(ids)} tokens"
        if all(label == -100 for label in labels[1:]):  # the first token has no context
            flags["no supervised token"][index] = f"{len(ids)} tokens"
        if first.setdefault((seen, labels), index) != index:
            flags["duplicate"][index] = f"as row {first[seen, labels]}"
    return flags


def write_valuation_page(
    path: Path, valuation: Valuation, summary: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """
    Writes a self-contained HTML page about a valuation. It loads nothing and runs no script.

    Args:
        path (`Path`):
            HTML file to write.
        valuation ([`Valuation`]):
            The valuation.
        summary (`dict[str, Any]`):
            Content of `valuation.json`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the examples.
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
    """Text and score of each token, special tokens included."""
    example = {"completion_ids": input_ids, "written_by": range(len(input_ids))}
    return word_credits(tokenizer, example, scores, None)


def whole_words(tokens: list[WordCredit]) -> list[WordCredit]:
    """Joins tokens to words, and sums their scores. Characters of scripts without spaces, such as Chinese, are not joined."""
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
    """Values of a row for the page."""
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
