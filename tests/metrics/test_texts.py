import sys

import pytest

from trl_dpg.language import _identifier
from trl_dpg.metrics import evaluate_texts
from trl_dpg.metrics.texts import common_share


SPANISH = [
    "La ciudad es conocida por sus iglesias y por el puerto que da al mar.",
    "El autor escribió varias novelas durante los años que pasó en la montaña.",
]
GERMAN = [
    "Die Stadt ist für ihre Kirchen und den Hafen am Meer bekannt.",
    "Der Autor schrieb mehrere Romane während seiner Jahre im Gebirge.",
]
UUID = "0123456789abcdef0123456789abcdef"


def test_language():
    pytest.importorskip("py3langid")
    values = evaluate_texts([*SPANISH, *GERMAN], language="es")
    assert set(values) == {"distinct", "language_share", "language_probability"}
    assert values["language_share"] == 0.5 and 0.4 < values["language_probability"] < 0.6
    assert evaluate_texts(GERMAN, language="de")["language_share"] == 1.0
    assert evaluate_texts(GERMAN, language="es")["language_probability"] < 0.1


def test_texts_without_letters_are_in_no_language():
    pytest.importorskip("py3langid")
    first = _identifier().rank("")[0][0]
    for language in ["es", first]:
        assert evaluate_texts(["", "  ", "\n"], language=language) == {
            "distinct": 1.0,
            "language_share": 0.0,
            "language_probability": 0.0,
        }
        assert evaluate_texts(["\x00"], language=language)["language_share"] == 0.0


def test_unknown_language():
    pytest.importorskip("py3langid")
    with pytest.raises(ValueError, match=r"`language` must be one of \['.*'es'.*\], got 'spanish'"):
        evaluate_texts(SPANISH, language="spanish")


def test_identifier_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ImportError, match=r"pip install trl-dpg\[baselines\]"):
        evaluate_texts(SPANISH, language="es")


def test_distinct():
    assert evaluate_texts(["a", "b", "a", "a"]) == {"distinct": 0.5}


def test_reference():
    values = evaluate_texts([f"It is {UUID}.", UUID[:16], "x" * 500, ""], reference=UUID)
    assert values["reference_exact"] == 0.25
    assert values["reference_soft"] == (1 + 0.5) / 4


def test_common_share():
    assert common_share("", "abc") == 0.0
    assert common_share("xabcx", "abc") == 1.0
    assert common_share("ab-bc", "abc") == pytest.approx(2 / 3)
    assert common_share("e" * 300 + "abc", "abcd") == 0.75  # letters that are frequent in a long text count too


def test_judge():
    seen = []

    def judge(texts):
        seen.extend(texts)
        return [0.0, 1.0]

    assert evaluate_texts(("a", "b"), judge=judge)["judge"] == 0.5
    assert seen == ["a", "b"]
    with pytest.raises(ValueError, match="`judge` must return a number for each text, got 2 for 3 texts"):
        evaluate_texts(["a", "b", "c"], judge=judge)


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="`texts` is empty"):
        evaluate_texts([])
    with pytest.raises(ValueError, match="`reference` is an empty string"):
        evaluate_texts(["a"], reference="")
