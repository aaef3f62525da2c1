"""Splitting documents into blocks: sentence boundaries, packing, alignment of salient spans."""

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
    (?: (?<![.!?\u2026\u0964\u061f]) [.!?\u2026\u0964\u061f]++   # terminator in scripts with spaces
        (?: ['"\u2019\u201d)\]\u00bb]++ | \s['\u2019]{2} | \s[)\]\u201d\u2019\u00bb] )*   # closing quotes, brackets
        (?: \s? \[ [^\[\]\n]{1,24} \] )*               # note marks: [1], [ citation needed ]
        (?= \s )
      | [\u3002\uff01\uff1f]++ [\u300d\u300f\uff09\u201d]*+   # terminator in scripts without spaces
      | (?<! \s ) (?= \s*\n\s*\n )                    # end of a paragraph
    )\s*+
    """,
    re.VERBOSE,
)
"""Every run of terminators and of white space is tried once, from its beginning, so that the time
is linear in the length of the text."""
_WORD_BEFORE = re.compile(r"(?:[^\W\d_]|\.)+\Z")
_LETTER = re.compile(r"[^\W_]")
_NEVER_LAST = re.compile(
    "mrs?|ms|messrs|mme|mlle|dr|prof|rev|fr|hon|gov|sen|rep|pres|gen|col|lt|capt|cpt|cmdr|adm|maj|sgt|cpl|pvt|ste?|mt|ft|bros|vs|viz|cf"
)
"""Abbreviations that precede a name or an explanation and never end a sentence."""
_BEFORE_NUMBER = re.compile(
    "nos?|vols?|pp?|figs?|ch|chap|sec|art|op|approx|ca?|b|d|ed|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
)
"""Abbreviations that do not end a sentence if a number follows."""


def sentence_bounds(text: str) -> list[int]:
    """Character offsets at which the sentences of `text` begin, starting with 0.

    White space belongs to the preceding sentence. The rules are for ordinary and for
    space-tokenized prose (`word .`): a full stop after a title, an initial or an acronym
    (`Dr. Who`, `J. K.`, `U.S.`) does not end a sentence, nor does any mark before a lower-case
    letter if the text contains capitals. In doubtful cases sentences are not split; this only
    affects where a block ends.
    """
    has_capitals = text != text.lower()
    bounds = [0]
    letter = 0  # offset of the first letter or digit after the possible end
    for match in _END.finditer(text):
        start = match.end()
        if letter < start:
            letter = found.start() if (found := _LETTER.search(text, start)) else len(text)
        if bounds[-1] < start < len(text) and not _continues_sentence(text, match, letter, has_capitals):
            bounds.append(start)
    return bounds


def _continues_sentence(text: str, match: re.Match[str], letter: int, has_capitals: bool) -> bool:
    """Whether the sentence continues after the possible end `match`; the next letter or digit is at
    offset `letter`."""
    mark = match.group().strip()
    if not mark or mark[0] in "\u3002\uff01\uff1f":
        return False
    following = text[letter : letter + 1]
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
        return False  # "the U.S. .": the abbreviation and the sentence have separate full stops
    if "." in name.strip(".") or (not spaced and len(name) == 1):
        return True
    if name in ("jr", "sr"):
        return text[match.end()] == "("
    return bool(_NEVER_LAST.fullmatch(name) or (following.isdigit() and _BEFORE_NUMBER.fullmatch(name)))


@dataclass
class Block:
    """Characters `start:end` and wordpieces `first:last` of a document.

    `sentence_starts` are relative to `first`.
    """

    start: int
    end: int
    first: int
    last: int
    sentence_starts: list[int] = field(default_factory=list)


def cut_blocks(
    text_length: int, offset_L2: np.ndarray, is_word_start_L: np.ndarray, bounds: Iterable[int], max_tokens: int
) -> list[Block]:
    """Pack whole sentences greedily into blocks of at most `max_tokens` wordpieces.

    See ORQA, section 6.2, and REALM, section 4. `offset_L2` contains the character offsets of the L
    ≥ 1 wordpieces, `bounds` the offsets at which sentences begin. A sentence longer than a block is
    split between words, a word longer than a block between wordpieces, but never within a
    character. Each character and each wordpiece is in exactly one block.
    """
    starts, ends = offset_L2[:, 0], offset_L2[:, 1]
    num_tokens = len(offset_L2)
    edges = [0]
    places = np.fromiter(bounds, np.int64)
    # One search for all: each would copy the offsets, which are not contiguous.
    for bound, token in zip(places.tolist(), np.searchsorted(starts, places).tolist(), strict=True):
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
            close(_last_split(starts, ends, is_word_start_L, first, first + max_tokens))
            sentence_starts.append(0)
    close(num_tokens)
    return blocks


def _last_split(starts: np.ndarray, ends: np.ndarray, is_word_start_L: np.ndarray, first: int, limit: int) -> int:
    """The last wordpiece in `(first, limit]` at which a block may begin.

    It begins a word if possible, else a character.
    """
    of_character = starts[first + 1 : limit + 1] >= ends[first:limit]
    of_word = of_character & is_word_start_L[first + 1 : limit + 1]
    for allowed in (of_word, of_character):
        if allowed.any():
            return first + 1 + int(np.flatnonzero(allowed)[-1])
    raise AssertionError("a character has more wordpieces than a block")


def align_spans(
    offset_L2: np.ndarray, sentence_starts: list[int], spans: Iterable[tuple[int, int, str]]
) -> Iterator[tuple[int, int, str]]:
    """Convert character spans to wordpiece spans (end exclusive).

    Spans that split a wordpiece or cross a sentence boundary are dropped.
    """
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
    """64-bit hash of the text after case folding and collapsing white space."""
    digest = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
