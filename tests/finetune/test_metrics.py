"""Question answering metrics: normalization, answers in passages, patterns, intervals."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.metrics import (
    answer_tokens,
    answers_in_corpus,
    exact_match,
    f1,
    has_answer,
    has_substring,
    normalize_answer,
)
from finetune.patterns import AnswerPattern, patterns_in_corpus
from realm.runtime.bootstrap import bootstrap_interval


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Beatles!", ["beatles"], True),
        ("a  lot of   rain", ["lot of rain"], True),
        ("Vienna", ["Paris", "vienna"], True),
        ("Vienna, Austria", ["Vienna"], False),
    ],
)
def test_exact_match_uses_squad_normalization(prediction: str, answers: list[str], expected: bool) -> None:
    assert exact_match(prediction, answers) is expected


def test_composed_and_decomposed_spellings_match_only_with_nfd() -> None:
    composed, decomposed = unicodedata.normalize("NFC", "Beyoncé"), unicodedata.normalize("NFD", "Beyoncé")
    assert exact_match(composed, [decomposed])
    assert not exact_match(composed, [decomposed], nfd=False)


def test_f1_is_the_maximum_over_answers() -> None:
    assert f1("the river Rhine", ["Rhine"]) == pytest.approx(2 * 1 / (2 + 1))
    assert f1("the river Rhine", ["Danube", "river Rhine"]) == 1.0
    assert f1("nothing", ["Rhine"]) == 0.0


def test_has_answer_matches_whole_tokens() -> None:
    assert has_answer("in abcdefg, hij and more", ["hij"])
    assert not has_answer("abcdefg hijklmn", ["hij"])
    assert has_answer("He died in NEW York.", ["New York"])
    assert not has_answer("He died in New, York.", ["New York"])


def test_an_empty_answer_is_never_found() -> None:
    assert not has_answer("anything", [""])
    assert not has_answer("anything", [" "])


@given(st.text(), st.text())
def test_metrics_accept_any_text(prediction: str, answer: str) -> None:
    assert 0.0 <= f1(prediction, [answer]) <= 1.0
    assert exact_match(answer, [answer])
    has_answer(prediction, [answer])


def test_tokens_match_dpr() -> None:
    assert answer_tokens("Mr. O'Neil's 1,000\u00a0km_run") == [
        "mr",
        ".",
        "o",
        "'",
        "neil",
        "'",
        "s",
        "1",
        ",",
        "000",
        "km",
        "_",
        "run",
    ]
    assert answer_tokens("Beyonce\u0301") == answer_tokens("Beyonc\u00e9") == ["beyonce\u0301"], (
        "a combining mark belongs to its letter"
    )


def test_substrings_match_inside_words_but_tokens_do_not() -> None:
    texts = ["abcdefg", "hijklmn"]
    assert [has_substring(text, ["hij"]) for text in texts] == [False, True]
    assert [has_answer(text, ["hij"]) for text in texts] == [False, False]
    assert not has_substring("anything", ["", " "])


def test_a_pattern_must_match_the_whole_prediction() -> None:
    pattern = AnswerPattern(r"Sept?(ember)?|Feb(ruary)?")
    assert pattern.is_answer("september") and pattern.is_answer(" Feb ")
    assert not pattern.is_answer("September 1918"), "re.match would accept the prefix"


# Results of SQuAD's official evaluation script for the same strings (normalize_answer,
# exact_match_score, f1_score).
OFFICIAL = [
    ("The Beatles", ["Beatles, the"], True, 1.0),
    ("the Beatles!", ["beatles"], True, 1.0),
    ("in 1969, at Woodstock", ["Woodstock"], False, 0.4),
    ("a  b", ["b"], True, 1.0),
    ("U.S.", ["US"], True, 1.0),
    ("don't", ["dont"], True, 1.0),
    ("x-ray", ["xray"], True, 1.0),
    ("", ["answer"], False, 0.0),
]


@pytest.mark.parametrize(("prediction", "answers", "em", "score"), OFFICIAL)
def test_parity_with_the_official_script_without_nfd(
    prediction: str, answers: list[str], em: bool, score: float
) -> None:
    assert exact_match(prediction, answers, nfd=False) is em
    assert normalize_answer(answers[0], nfd=False) == normalize_answer(answers[0])
    assert f1(prediction, answers, nfd=False) == pytest.approx(score)


@given(
    st.lists(st.sampled_from(["ab", "b a", "a", "c-d", "c", ""]), min_size=1, max_size=4),
    st.lists(st.text("abc -", max_size=12), max_size=5),
)
def test_answers_in_corpus_agrees_with_has_answer(answers: list[str], texts: list[str]) -> None:
    found = answers_in_corpus(texts, [[answer] for answer in answers])
    assert found.tolist() == [any(has_answer(text, [answer]) for text in texts) for answer in answers]


def test_articles_inside_accented_words_are_kept() -> None:
    assert not exact_match("thé", ["á"]) and f1("théâtre", ["thé"]) == 0.0
    assert exact_match("the thé", ["thé"]) and exact_match("a tea", ["the tea"])


def test_patterns_do_not_match_across_passages() -> None:
    texts = ["It ends with New", "York begins it"] * 600
    assert patterns_in_corpus(texts, [AnswerPattern(r"New\s?York"), AnswerPattern("begins")]).tolist() == [False, True]
    asked = [AnswerPattern(pattern) for pattern in ("^York", "New$", r"\AIt", r"^begins", r"New\W+York", r"It\W|x")]
    assert patterns_in_corpus(texts, asked).tolist() == [True, True, True, False, False, True]


def test_bootstrap_intervals_cover_the_mean_and_are_deterministic() -> None:
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 400) ** 0.5, rel=0.15)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.ones(10)) == (1.0, 1.0)
