"""The terms of BM25: the words of wordpieces, and their beginnings or stems."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import Stemmer

from realm.text.inputs import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TERMS_VERSION = 1
"""Increment it when the terms of a text change: existing BM25 indexes are then built again."""


class Terms:
    """Turns wordpieces into terms: the same for passages, masked sentences and questions.

    Wordpieces are joined to whole words and lowercased. Words that contain a special token, such as
    `[MASK]` or `[UNK]`, and words without a letter or digit are dropped. The beginnings of words
    let forms of a word match in any language (truncation, McNamee and Mayfield 2004, section 3).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prefix: int = 0, stemmer: str | None = None) -> None:
        """`prefix`: the first so many characters of a longer word are a term in addition to the
        word; 0: none. `stemmer`: language of a Snowball stemmer (`Stemmer.algorithms()`), whose
        stems replace the words; None: none."""
        self._pieces = list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        self._continues = [piece.startswith("##") for piece in self._pieces]
        self._special = frozenset(tokenizer.all_special_ids)
        self._prefix = prefix
        self._stemmer = None if stemmer is None else Stemmer.Stemmer(stemmer, 0)
        self._terms_of: dict[tuple[int, ...], tuple[str, ...]] = {}
        """Terms by the word's wordpieces; none if the word is dropped."""

    def __call__(self, ids: Sequence[int] | IntArray) -> list[str]:
        """The terms of a text's wordpieces, in order, with repetitions."""
        pieces = list(map(int, ids))
        # A text may begin inside a word.
        edges = [at for at, piece in enumerate(pieces) if at == 0 or not self._continues[piece]]
        terms: list[str] = []
        for start, end in pairwise([*edges, len(pieces)]):
            word = tuple(pieces[start:end])
            found = self._terms_of.get(word)
            if found is None:
                found = self._terms_of[word] = self._terms(word)
            terms += found
        return terms

    def _terms(self, word: tuple[int, ...]) -> tuple[str, ...]:
        if not self._special.isdisjoint(word):
            return ()
        text = "".join(self._pieces[piece].removeprefix("##") for piece in word).lower()
        if not any(map(str.isalnum, text)):
            return ()
        term = text if self._stemmer is None else self._stemmer.stemWord(text)
        return (term, text[: self._prefix]) if 0 < self._prefix < len(text) else (term,)
