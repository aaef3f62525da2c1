"""Documents cut into blocks: sentence ends, packing into blocks of bounded size, salient spans
as wordpieces."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

NUM_SPECIAL_TOKENS = 3
"""`[CLS] title [SEP] text [SEP]`, as `realm.text.inputs.Wordpieces.passage` builds it."""

_END = re.compile(
    r"""
    (?: [.!?\u2026\u0964\u061f]+                       # full stop, and its like in scripts that put white space behind it
        (?: ['"\u2019\u201d)\]\u00bb]+ | \s['\u2019]{2} | \s[)\]\u201d\u2019\u00bb] )*   # what closes with the sentence
        (?: \s? \[ [^\[\]\n]{1,24} \] )*               # note marks: [1], [ citation needed ]
        (?= \s )
      | [\u3002\uff01\uff1f]+ [\u300d\u300f\uff09\u201d]*   # their like in scripts without white space
      | (?= \s*\n\s*\n )                              # a paragraph's end
    )\s*
    """,
    re.VERBOSE,
)
_WORD_BEFORE = re.compile(r"(?:[^\W\d_]|\.)+\Z")
_NOT_LETTERS = re.compile(r"[\W_]*")
_NEVER_LAST = re.compile(
    "mrs?|ms|messrs|mme|mlle|dr|prof|rev|fr|hon|gov|sen|rep|pres|gen|col|lt|capt|cpt|cmdr|adm|maj|sgt|cpl|pvt|ste?|mt|ft|bros|vs|viz|cf"
)
"""Abbreviations that stand before a name or an explanation: no sentence ends with them."""
_BEFORE_NUMBER = re.compile(
    "nos?|vols?|pp?|figs?|ch|chap|sec|art|op|approx|ca?|b|d|ed|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
)
"""Abbreviations that end no sentence where a number follows."""


def sentence_bounds(text: str) -> list[int]:
    """Characters at which the sentences of `text` begin, the first 0; white space belongs to the
    sentence before it.

    Rules, for prose as people write it and as corpora space it (`word .`): a full stop ends no
    sentence behind a title, an initial or an acronym (`Dr. Who`, `J. K.`, `U.S.`), nor does any
    mark before a lower-case letter where the text has capitals at all. Where in doubt two sentences
    stay one: a block then merely ends elsewhere.
    """
    has_capitals = text != text.lower()
    bounds = [0]
    for match in _END.finditer(text):
        start = match.end()
        if bounds[-1] < start < len(text) and not _goes_on(text, match, has_capitals):
            bounds.append(start)
    return bounds


def _goes_on(text: str, match: re.Match[str], has_capitals: bool) -> bool:
    mark = match.group().strip()
    if not mark or mark[0] in "\u3002\uff01\uff1f":
        return False
    letters = _NOT_LETTERS.match(text, match.end())
    following = text[letters.end() : letters.end() + 1] if letters else ""
    if not following or (has_capitals and following.islower()) or text[match.end()] in ".,;:!?":
        return True
    if mark != ".":
        return False
    before = text[max(0, match.start() - 24) : match.start()]
    spaced = before[-1:].isspace()
    word = _WORD_BEFORE.search(before.rstrip())
    if word is None:
        return False
    name = word.group().lower()
    if spaced and name.endswith("."):
        return False  # "the U.S. ." : the abbreviation has its own stop
    if "." in name.strip(".") or (not spaced and len(name) == 1):
        return True
    if name in ("jr", "sr"):
        return text[match.end()] == "("
    return bool(_NEVER_LAST.fullmatch(name) or (following.isdigit() and _BEFORE_NUMBER.fullmatch(name)))


@dataclass
class Block:
    """Characters `start:end` of a document, and wordpieces `first:last` of its encoding;
    sentence starts count from `first`."""

    start: int
    end: int
    first: int
    last: int
    sentence_starts: list[int] = field(default_factory=list)


def cut_blocks(
    text_length: int, offset_L2: np.ndarray, is_word_start_L: np.ndarray, bounds: Iterable[int], max_tokens: int
) -> list[Block]:
    """Packs whole sentences greedily into blocks of at most `max_tokens` wordpieces (ORQA, section
    6.2; REALM, section 4).

    `offset_L2` holds the characters of each of the L ≥ 1 wordpieces, `bounds` the characters at
    which sentences begin. A sentence longer than a block is cut between words, a word longer than a
    block between wordpieces, though never within a character. Each character and each wordpiece is
    in exactly one block.
    """
    starts, ends = offset_L2[:, 0], offset_L2[:, 1]
    num_tokens = len(offset_L2)
    edges = [0]
    for bound in bounds:
        token = int(np.searchsorted(starts, bound))
        if edges[-1] < token < num_tokens and ends[token - 1] <= bound:
            edges.append(token)
    edges.append(num_tokens)
    blocks: list[Block] = []
    first, sentence_starts = 0, [0]

    def close(last: int) -> None:
        nonlocal first, sentence_starts
        character = text_length if last == num_tokens else int(starts[last])
        blocks.append(Block(blocks[-1].end if blocks else 0, character, first, last, sentence_starts))
        first, sentence_starts = last, []

    for sentence, sentence_end in pairwise(edges):
        if sentence_end - first > max_tokens and sentence > first:
            close(sentence)
        if not sentence_starts or sentence > first:
            sentence_starts.append(sentence - first)
        while sentence_end - first > max_tokens:
            close(_cut(starts, ends, is_word_start_L, first, first + max_tokens))
            sentence_starts.append(0)
    close(num_tokens)
    return blocks


def _cut(starts: np.ndarray, ends: np.ndarray, is_word_start_L: np.ndarray, first: int, limit: int) -> int:
    """The last wordpiece in `(first, limit]` that a block may begin with: the first of a word if
    there is one, else of a character."""
    of_character = starts[first + 1 : limit + 1] >= ends[first:limit]
    of_word = of_character & is_word_start_L[first + 1 : limit + 1]
    for allowed in (of_word, of_character):
        if allowed.any():
            return first + 1 + int(np.flatnonzero(allowed)[-1])
    raise AssertionError("a character of more wordpieces than a block")


def align_spans(
    offset_L2: np.ndarray, sentence_starts: list[int], spans: Iterable[tuple[int, int, str]]
) -> Iterator[tuple[int, int, str]]:
    """Character spans as wordpiece spans (end exclusive), without those that cut a wordpiece or
    cross a sentence's end."""
    starts, ends = offset_L2[:, 0], offset_L2[:, 1]
    for start, end, kind in spans:
        first = int(np.searchsorted(starts, start, side="left"))
        last = int(np.searchsorted(ends, end, side="right"))
        if first >= last or starts[first] != start or ends[last - 1] != end:
            continue
        if any(first < sentence < last for sentence in sentence_starts):
            continue
        yield first, last, kind


def text_hash(text: str) -> int:
    """64-bit hash of the text, case folded and white space collapsed: equal for copies that
    differ in nothing else."""
    digest = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
