"""The words of wordpiece texts: which belong together, which are frequent, which carry content.

Everything is decided by characters and counts, so that it works in any language.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from realm.corpus.prepared import PreparedCorpus
from realm.text.inputs import IntArray, Wordpieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLAUSE_ENDS = frozenset(',;:–—…،؛、，；："')
_HYPHENS, _APOSTROPHES = frozenset("-‐‑/&"), frozenset("'’ʼ")
_SAMPLE_PLACES, _SAMPLE_ROWS = 64, 64
"""Frequent words are counted at so many places of a corpus, in so many consecutive rows at each."""

_NUM_LEADING = 10
"""Number of words that may stand before a phrase."""


@dataclass(frozen=True)
class Word:
    """A word or a punctuation mark: wordpieces `start:end` of a text.

    Parts joined by a mark are one word: `two-year`, `don't`, `J. K.`, `1,000`.
    """

    start: int
    end: int
    is_mark: bool
    """Whether it has no letter, digit or symbol."""
    is_frequent: bool = False
    is_content: bool = False
    """Whether it can be part of a phrase: a plain word that is not frequent."""


class Words:
    """Splits texts into words."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.wordpieces = Wordpieces.from_tokenizer(tokenizer)
        self._names = [name.removeprefix("##") for name in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        special = set(tokenizer.all_special_ids)
        self._is_mark = np.array([n in special or _is_mark(name) for n, name in enumerate(self._names)])
        self._has_letter = np.array(
            [n not in special and any(map(str.isalpha, name)) for n, name in enumerate(self._names)]
        )
        self._is_symbol = np.array(
            [not any(map(str.isalnum, name)) and _category(name) != "Sc" for name in self._names]
        )
        self._ends_clause = np.array([_ends_clause(name) for name in self._names])
        self._bracket = np.array([{"Ps": 1, "Pe": -1}.get(_category(name), 0) for name in self._names])
        self.frequent: frozenset[bytes] = frozenset()
        """Wordpieces of the frequent words."""
        self.leading: frozenset[bytes] = frozenset()
        """Wordpieces of the most frequent of these, which may stand before a phrase."""

    def count_frequent(self, corpus: PreparedCorpus, num_frequent: int) -> None:
        """Set `frequent` to the words of most blocks of a corpus, at most a tenth of those found.

        They are counted in a sample of blocks that depends only on their number: 64 consecutive
        ones at 64 places, so that only a few parts of a large corpus are read. Numbers do not
        count.
        """
        rows = corpus.rows
        firsts = np.linspace(0, max(0, len(rows) - _SAMPLE_ROWS), _SAMPLE_PLACES).astype(int)
        places = {place for first in firsts.tolist() for place in range(first, min(first + _SAMPLE_ROWS, len(rows)))}
        counts: Counter[bytes] = Counter()
        for row in rows[sorted(places)].tolist():
            ids = np.asarray(corpus.text_ids(row), np.int32)
            bounds = [(start, end) for start, end in self._bounds(ids) if self._has_letter[ids[start]]]
            counts.update({ids[start:end].tobytes() for start, end in bounds})
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        ranked = ranked[: min(num_frequent, len(ranked) // 10)]
        self.frequent, self.leading = frozenset(ranked), frozenset(ranked[:_NUM_LEADING])

    def split(self, ids: IntArray) -> list[Word]:
        """The words of a text in order."""
        ids = np.asarray(ids, np.int32)
        words = [self._word(ids, start, end) for start, end in self._bounds(ids)]
        joined: list[Word] = []
        for place, word in enumerate(words):
            if len(joined) > 1 and self._joins(ids, words[place - 2 : place + 1]):
                before = [joined.pop(), joined.pop()][1]
                plain = self.text(ids[words[place - 1].start : words[place - 1].end]) in _HYPHENS
                content = plain and (before.is_content or word.is_content)
                word = replace(word, start=before.start, is_frequent=False, is_content=content)
            joined.append(word)
        return joined

    def text(self, ids: IntArray) -> str:
        """The characters of wordpieces, without spaces."""
        return "".join(self._names[piece] for piece in ids)

    def ends_clause(self, ids: IntArray, word: Word) -> bool:
        """Whether a word is a mark between clauses: a comma, a dash, a quotation mark, …"""
        return bool(self._ends_clause[ids[word.start]])

    def without_brackets(self, ids: IntArray, words: list[Word], start: int, end: int) -> list[Word] | None:
        """The words without those in brackets, except in brackets around wordpieces `start:end`.

        None if a bracket is closed that was not opened: the text is a fragment.
        """
        opened: list[int] = []
        dropped: set[int] = set()
        for place, word in enumerate(words):
            kind = self._bracket[ids[word.start]]
            if kind > 0:
                opened.append(place)
            elif kind < 0:
                if not opened:
                    return None
                first = opened.pop()
                if word.end <= start or words[first].start >= end:
                    dropped.update(range(first, place + 1))
        return [word for place, word in enumerate(words) if place not in dropped]

    def phrases(self, ids: IntArray, salient: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Runs of content words that probably are noun phrases, as starts and ends in wordpieces.

        A run ends before a frequent word or a mark and follows one of the most frequent words,
        which in most languages are articles, prepositions and conjunctions. Runs that overlap a
        salient span or stand next to one are left out, because they are parts of names, or their
        verbs.
        """
        words = self.split(ids)
        edges = np.flatnonzero(np.diff([0, *(word.is_content for word in words), 0]))
        runs = [
            (words[first - 1], words[first], words[last - 1]) for first, last in edges.reshape(-1, 2).tolist() if first
        ]
        return [
            (first.start, last.end)
            for before, first, last in runs
            if ids[before.start : before.end].tobytes() in self.leading
            and all(last.end < start or end < first.start for start, end in salient)
        ]

    def _bounds(self, ids: IntArray) -> list[tuple[int, int]]:
        starts = np.flatnonzero(~self.wordpieces.continuation[ids]).tolist()
        return list(pairwise([*([0] if starts[:1] != [0] and len(ids) else []), *starts, len(ids)]))

    def _word(self, ids: IntArray, start: int, end: int) -> Word:
        if self._is_mark[ids[start]]:
            return Word(start, end, True)
        frequent = ids[start:end].tobytes() in self.frequent
        return Word(start, end, False, frequent, not (frequent or self._is_symbol[ids[start]]))

    def _joins(self, ids: IntArray, words: list[Word]) -> bool:
        """Whether the mark between two words is part of a longer word."""
        before, mark, after = words
        if not mark.is_mark or before.is_mark or after.is_mark:
            return False
        character, left, right = (self.text(ids[word.start : word.end]) for word in (mark, before, after))
        numbers = left.isdecimal() and right.isdecimal()
        return (
            character in _HYPHENS
            or (character in _APOSTROPHES and min(len(left), len(right)) <= 2)
            or (character == "." and (numbers or (len(left) == 1 and left.isalpha())))
            or (character == "," and numbers and len(right) == 3)
        )


def _category(name: str) -> str:
    return unicodedata.category(name) if len(name) == 1 else ""


def _is_mark(name: str) -> bool:
    """Whether a wordpiece is a punctuation mark; `%` and symbols are not."""
    return name != "%" and _category(name)[:1] in ("P", "Z", "C")


def _ends_clause(name: str) -> bool:
    return name in _CLAUSE_ENDS or _category(name) in ("Pi", "Pf")
