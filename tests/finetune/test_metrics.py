import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.metrics import exact_match, f1, has_answer


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Beatles!", ["beatles"], True),
        ("a  lot of   rain", ["lot of rain"], True),
        ("Vienna", ["Paris", "vienna"], True),
        ("Vienna, Austria", ["Vienna"], False),
    ],
)
def test_exact_match_follows_the_squad_normaliser(prediction: str, answers: list[str], expected: bool) -> None:
    assert exact_match(prediction, answers) is expected


def test_composed_and_decomposed_spellings_agree_only_with_nfd() -> None:
    composed, decomposed = unicodedata.normalize("NFC", "Beyoncé"), unicodedata.normalize("NFD", "Beyoncé")
    assert exact_match(composed, [decomposed])
    assert not exact_match(composed, [decomposed], nfd=False)


def test_f1_counts_common_tokens_of_the_best_answer() -> None:
    assert f1("the river Rhine", ["Rhine"]) == pytest.approx(2 * 1 / (2 + 1))
    assert f1("the river Rhine", ["Danube", "river Rhine"]) == 1.0
    assert f1("nothing", ["Rhine"]) == 0.0


def test_has_answer_matches_whole_tokens() -> None:
    assert has_answer("in abcdefg, hij and more", ["hij"])
    assert not has_answer("abcdefg hijklmn", ["hij"])
    assert has_answer("He died in NEW York.", ["New York"])
    assert not has_answer("He died in New, York.", ["New York"])


def test_an_empty_answer_stands_nowhere() -> None:
    assert not has_answer("anything", [""])
    assert not has_answer("anything", [" "])


@given(st.text(), st.text())
def test_metrics_accept_any_text(prediction: str, answer: str) -> None:
    assert 0.0 <= f1(prediction, [answer]) <= 1.0
    assert exact_match(answer, [answer])
    has_answer(prediction, [answer])
