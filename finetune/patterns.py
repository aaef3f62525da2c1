"""Answers given as regular expressions (CuratedTREC), matched within a time limit.

The syntax is that of Python's `re`; the `regex` package matches, because it can be stopped.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import regex

from realm.errors import first_line, shortened

LIMIT_S = 1.0
"""Longest time of one match in seconds."""
_TRIAL_S = 0.25
_MAX_LENGTH = 5_000
_MAX_SIZE = 50_000
_ELEMENT = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,\d*)?\}|.", re.DOTALL)

logger = logging.getLogger(__name__)


class AnswerPattern:
    """A regular expression that describes the accepted answers to a question, ignoring case.

    A match that takes longer than `LIMIT_S` is none; the first is logged.
    """

    def __init__(self, text: str) -> None:
        """Raises ValueError if `text` is not a valid regular expression, or is too large."""
        self.text = text
        self._has_anchors = any(mark in text for mark in ("^", "$", "\\A", "\\Z"))
        self._logged = False
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"it has {len(text):,} characters; the limit is {_MAX_LENGTH:,}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # about sets that `re` will read differently one day
                re.compile(text, re.IGNORECASE)
            if _size(text) > _MAX_SIZE:
                raise ValueError("its repetitions are too large")
            self._compiled = regex.compile(text, regex.IGNORECASE)
        except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(first_line(error)) from None

    def check(self) -> None:
        """Raise ValueError if it matches the empty string, or needs exponential time.

        It is tried on repetitions of each character that it contains.
        """
        if self._compiled.fullmatch(""):
            raise ValueError("it matches the empty string")
        try:
            for character in sorted({"a", "1", *filter(str.isalnum, self.text)}):
                for trial in (f"{character * 60}!", f"{character} " * 30 + "!"):
                    self._compiled.fullmatch(trial, timeout=_TRIAL_S)
                    self._compiled.search(trial, timeout=_TRIAL_S)
        except TimeoutError:
            raise ValueError(f"matching {shortened(trial, 10)!r} takes exponential time") from None

    def is_answer(self, prediction: str) -> bool:
        """Whether it matches the whole stripped prediction, not only a prefix."""
        try:
            return self._compiled.fullmatch(prediction.strip(), timeout=LIMIT_S) is not None
        except TimeoutError:
            return self._too_slow()

    def is_in(self, text: str) -> bool:
        """Whether it matches anywhere in a text."""
        try:
            return self._compiled.search(text, timeout=LIMIT_S) is not None
        except TimeoutError:
            return self._too_slow()

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of the non-overlapping matches in a text that are not blank."""
        try:
            for match in self._compiled.finditer(text, timeout=LIMIT_S):
                if match.group().strip():
                    yield match.span()
        except TimeoutError:
            self._too_slow()

    def is_in_any(self, parts: Sequence[Sequence[str]], joined: Sequence[str]) -> bool:
        """Whether it matches in any text of `parts`; `joined` contains each part as one text."""
        # Searching the joined texts first is faster. A pattern without anchors that matches in a
        # text also matches in the joined texts, but not the other way round.
        return any(
            self.is_in(text)
            for part, whole in zip(parts, joined, strict=True)
            if self._has_anchors or self._may_be_in(whole)
            for text in part
        )

    def _may_be_in(self, text: str) -> bool:
        """Like `is_in`, but true if it takes too long."""
        try:
            return self._compiled.search(text, timeout=LIMIT_S) is not None
        except TimeoutError:
            return True

    def _too_slow(self) -> bool:
        """Log it once; returns False, for no match."""
        if not self._logged:
            logger.warning(
                "the regular expression %r took more than %g s on a text, which counts as no match; simplify it.",
                shortened(self.text),
                LIMIT_S,
            )
        self._logged = True
        return False


def patterns_in_corpus(texts: Sequence[str], patterns: Sequence[AnswerPattern]) -> np.ndarray:
    """Whether each pattern matches in any of the texts, (patterns,) bool."""
    parts = [texts[start : start + 1000] for start in range(0, len(texts), 1000)]
    joined = ["\0\n\0".join(part) for part in parts]
    return np.array([pattern.is_in_any(parts, joined) for pattern in patterns], dtype=bool)


def _size(pattern: str) -> int:
    """Upper bound of the characters in a pattern whose repetitions are written out, as `regex`
    compiles it."""
    sizes, last = [0], 0
    for element in _ELEMENT.finditer(pattern):
        times = element[1]
        if times is not None:
            sizes[-1] += last * max(0, int(times) - 1)
            last *= max(1, int(times))
        elif element[0] == "(":
            sizes.append(0)
        elif element[0] == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)
