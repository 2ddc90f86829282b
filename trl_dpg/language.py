"""Identifies the language of a text by `py3langid`."""

from functools import cache
from typing import Any


def check_language(language: str, name: str) -> None:
    """Raises a [`ValueError`] if `py3langid` does not know a language. `name` is the argument's name, for the message."""
    labels = sorted(_identifier().labels)
    if language not in labels:
        raise ValueError(f"{name} must be one of {labels}, got {language!r}.")


def identify(text: str, language: str) -> tuple[bool, float]:
    """
    Whether a text is more likely in a language than in any other, and the probability of this language.

    A text without letters is in no language. Raises an [`ImportError`] if `py3langid` isn't installed.
    """
    if not text.strip():
        return False, 0.0
    ranked = _identifier().rank(text)
    # Without any letters, all languages are equally likely, and the first one in the list means nothing.
    identified = ranked[0][0] == language and ranked[0][1] > ranked[1][1]
    return identified, dict(ranked)[language]


def _identifier() -> Any:
    try:
        import py3langid.langid as langid
    except ImportError as error:
        raise ImportError("Telling languages apart needs `py3langid`: `pip install trl-dpg[baselines]`.") from error
    return _load(langid)


@cache
def _load(langid: Any) -> Any:  # takes a second
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
