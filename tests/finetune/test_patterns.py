"""Answers as regular expressions: syntax, limits of time and size."""

import time

import pytest

from finetune import patterns
from finetune.patterns import AnswerPattern


@pytest.mark.parametrize(
    "pattern",
    [
        "a{99999999999999999999}",
        "(?u)(?a)x",
        "(" * 5_000,
        "((a{1000}){1000}){1000}",
        "a|" * 5_000,
        "(",
        "(?R)",
        "\\p{L}",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_invalid_patterns_are_refused_at_once(pattern: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError):
        AnswerPattern(pattern)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(1|11|111)+b?c?$"])
def test_patterns_that_need_exponential_time_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="exponential time"):
        AnswerPattern(pattern).check()


def test_a_pattern_that_hangs_in_re_matches_in_time() -> None:
    pattern = AnswerPattern(r"(\w+\s?)+\d$")
    pattern.check()
    assert not pattern.is_in("word " * 40 + "!") and pattern.is_answer("version 5")


def test_a_match_that_takes_too_long_is_none_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 0.05)
    pattern = AnswerPattern("(é|éé)+$")
    text = "é" * 200 + "!"
    assert not pattern.is_in(text) and not pattern.is_answer(text) and list(pattern.spans(text)) == []
    assert [record.getMessage().count("took more than") for record in caplog.records] == [1]


def test_sizes_count_nested_repetitions() -> None:
    assert patterns._size(r"\d{4}-[a-z{9}]{2}(ab){3}") == 4 + 1 + 2 + 6
