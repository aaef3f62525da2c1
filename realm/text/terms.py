"""The terms of BM25: the words of wordpieces, stemmed."""

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
    `[MASK]` or `[UNK]`, and words without a letter or digit are dropped. The other words are
    stemmed.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stemmer: str | None) -> None:
        """`stemmer`: language of a Snowball stemmer (`Stemmer.algorithms()`); None: whole words."""
        self._pieces = list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        self._continues = [piece.startswith("##") for piece in self._pieces]
        self._special = frozenset(tokenizer.all_special_ids)
        self._stemmer = None if stemmer is None else Stemmer.Stemmer(stemmer, 0)
        self._term_of: dict[tuple[int, ...], str] = {}
        """Term by the word's wordpieces; empty if the word is dropped."""

    def __call__(self, ids: Sequence[int] | IntArray) -> list[str]:
        """The terms of a text's wordpieces, in order, with repetitions."""
        pieces = list(map(int, ids))
        # A text may begin inside a word.
        edges = [at for at, piece in enumerate(pieces) if at == 0 or not self._continues[piece]]
        terms = []
        for start, end in pairwise([*edges, len(pieces)]):
            word = tuple(pieces[start:end])
            term = self._term_of.get(word)
            if term is None:
                term = self._term_of[word] = self._term(word)
            if term:
                terms.append(term)
        return terms

    def _term(self, word: tuple[int, ...]) -> str:
        if not self._special.isdisjoint(word):
            return ""
        text = "".join(self._pieces[piece].removeprefix("##") for piece in word).lower()
        if not any(map(str.isalnum, text)):
            return ""
        return text if self._stemmer is None else self._stemmer.stemWord(text)
