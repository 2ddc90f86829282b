"""Read-outs of generated texts that need no paid judge: language, variety, a string that should be in them."""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from statistics import fmean

from ..language import check_language, identify


def evaluate_texts(
    texts: Sequence[str],
    language: str | None = None,
    reference: str | None = None,
    judge: Callable[[list[str]], Sequence[float]] | None = None,
) -> dict[str, float]:
    """
    Measures what a generator writes.

    A language identifier also takes gibberish of the right letters for the language. Read `language_share` beside the
    `perplexity` that [`LanguageModelingLikelihood`] on real text of the language gives for the fine-tuned target, and
    beside the generator's entropy.

    Args:
        texts (`Sequence[str]`):
            Generated texts.
        language (`str`, *optional*):
            ISO 639-1 code of the language wanted, e.g. `"es"`. Texts of a few words are often taken for a neighboring
            language.
        reference (`str`, *optional*):
            String wanted in the texts, e.g. a UUID.
        judge (`Callable`, *optional*):
            A judgement of your own: takes the texts, returns a number for each.

    Returns:
        `dict[str, float]`:

        - `distinct`: number of different texts relative to all;
        - with a language `language_share`, the share of texts that `py3langid` identifies as it, and
          `language_probability`, the mean probability that it gives the language. An empty text has none;
        - with a reference `reference_exact`, the share of texts that contain it, and `reference_soft`, the mean length
          of the longest substring in common with it, in characters relative to its own;
        - with a judge `judge`, the mean of its numbers.

    Raises:
        [`ImportError`]: If a language is given and `py3langid` isn't installed.
        [`ValueError`]: If there are no texts, if the language is unknown, if the reference is empty, or if the judge does
            not return a number for each text.

    Example:

    ```python
    >>> evaluate_texts(["a1b2c3", "a1b"], reference="a1b2", judge=lambda texts: [len(text) for text in texts])
    {'distinct': 1.0, 'reference_exact': 0.5, 'reference_soft': 0.875, 'judge': 4.5}

    ```
    """
    texts = list(texts)
    if not texts:
        raise ValueError("`texts` is empty. Give at least one text.")
    values = {"distinct": len(set(texts)) / len(texts)}
    if language is not None:
        check_language(language, "`language`")
        identified, probabilities = zip(*(identify(text, language) for text in texts), strict=True)
        values["language_share"] = fmean(identified)
        values["language_probability"] = fmean(probabilities)
    if reference is not None:
        if not reference:
            raise ValueError("`reference` is an empty string. Leave it out, or give the string to look for.")
        values["reference_exact"] = fmean(reference in text for text in texts)
        values["reference_soft"] = fmean(common_share(text, reference) for text in texts)
    if judge is not None:
        scores = judge(texts)
        if len(scores) != len(texts):
            raise ValueError(f"`judge` must return a number for each text, got {len(scores)} for {len(texts)} texts.")
        values["judge"] = fmean(scores)
    return values


def common_share(text: str, reference: str) -> float:
    """Characters of the longest common substring, relative to the reference: 1 if the text contains it."""
    return SequenceMatcher(None, text, reference, autojunk=False).find_longest_match().size / len(reference)
