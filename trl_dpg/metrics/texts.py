"""Read-outs of generated texts without a paid judge: their language, their variety, and whether a string is in them."""

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
    Evaluates the texts of a generator.

    A language identifier also accepts gibberish with the letters of a language. So do not read `language_share` alone. Also look at
    the generator's entropy, and at the fine-tuned target's `perplexity` on real text of the language, from
    [`LanguageModelingLikelihood`].

    Args:
        texts (`Sequence[str]`):
            Generated texts.
        language (`str`, *optional*):
            ISO 639-1 code of the wanted language, e.g. `"es"`. Texts of a few words are often mistaken for a neighboring
            language.
        reference (`str`, *optional*):
            String that the texts should contain, e.g. a UUID.
        judge (`Callable`, *optional*):
            A judge of your own: takes the texts, and returns a number for each.

    Returns:
        `dict[str, float]`:

        - `distinct`: number of different texts, divided by the number of all texts.
        - With a language, `language_share`: share of texts that `py3langid` identifies as this language. And
          `language_probability`: mean probability of this language. For an empty text, it is 0.
        - With a reference, `reference_exact`: share of texts that contain the reference. And `reference_soft`: mean length
          of the longest common substring of text and reference, divided by the length of the reference.
        - With a judge, `judge`: mean of the judge's numbers.

    Raises:
        [`ImportError`]: If a language is given and `py3langid` isn't installed.
        [`ValueError`]: If there are no texts, the language is unknown, or the reference is empty. Also if the judge does
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
    """Length of the longest common substring, divided by that of the reference: 1 if the text contains the reference."""
    return SequenceMatcher(None, text, reference, autojunk=False).find_longest_match().size / len(reference)
