"""One HTML page about the rows of a data set and their scores."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

from transformers import PreTrainedTokenizerBase

from ..credit.words import WordCredit, word_credits
from ..metagradients import TargetTrainingArguments
from ..publishing.outcome import recipe_text
from .page import PAPER, render


if TYPE_CHECKING:
    from torch import Tensor

    from ..scripts.value import Valuation


SHOWN = 12  # best and worst rows each
WORDS_SHOWN = 300  # of a row
MEANINGS = {  # of flags
    "cut": ("cut at max_length", "What is behind it has no part in the score."),
    "no supervised token": ("without a token to learn", "The score is always 0."),
    "duplicate": ("the same as an earlier one", "The model reads the same tokens."),
}


def write_valuation_page(
    path: Path, valuation: "Valuation", summary: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """
    Writes a page that holds all that it shows, loads nothing and runs no script.

    Args:
        path (`Path`):
            HTML file to write.
        valuation ([`~trl_dpg.scripts.value.Valuation`]):
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


def token_credits(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], scores: "Tensor") -> list[WordCredit]:
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


def _row(valuation: "Valuation", index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
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
