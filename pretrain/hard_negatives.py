"""Hard negatives of inverse cloze: passages that BM25 finds for the query, and other blocks of the
same document."""

import numpy as np

from index.lexical import LexicalIndex, best_rows
from pretrain.cloze_pairs import ClozePair
from realm.corpus.collate import Collator
from realm.text.terms import Terms
from realm.training.sections import IctNegativesConfig

LEXICAL_DEPTH = 20
"""BM25 negatives are drawn from this number of passages that it finds."""
_RANDOM_DRAWS = 8


class HardNegatives:
    """Draws the same number of passages for every query, so that all ranks have batches of the same
    size: random passages where there are too few hard negatives."""

    def __init__(
        self, collator: Collator, config: IctNegativesConfig, lexical: LexicalIndex | None, terms: Terms
    ) -> None:
        """`lexical`: required for negatives by BM25."""
        assert lexical is not None or not config.lexical
        self.collator, self.passages, self.config = collator, collator.passages, config
        self.lexical, self.terms = lexical, terms

    def draw(self, pair: ClozePair, rng: np.random.Generator) -> list[int]:
        """Rows of the negatives of a pair."""
        found: list[int] = []
        if self.config.lexical:
            found += self._some(self._by_bm25(pair), self.config.lexical, rng)
        if self.config.document:
            found += self._some(self._of_document(pair), self.config.document, rng)
        while len(found) < self.config.lexical + self.config.document:
            random_rows = rng.choice(self.passages.rows, _RANDOM_DRAWS).tolist()
            found.append(next((row for row in random_rows if self.is_negative(pair, row)), random_rows[0]))
        return found

    @staticmethod
    def _some(rows: list[int], count: int, rng: np.random.Generator) -> list[int]:
        """`count` of the rows at random, or all if there are fewer."""
        return [rows[i] for i in rng.permutation(len(rows))[:count]]

    def _by_bm25(self, pair: ClozePair) -> list[int]:
        assert self.lexical is not None
        rows = best_rows(self.lexical.scores(self.terms(pair.query_ids)), LEXICAL_DEPTH)
        return [row for row in rows.tolist() if self.is_negative(pair, row)]

    def _of_document(self, pair: ClozePair) -> list[int]:
        passages, document = self.passages, self.passages.document(pair.row)
        first = pair.row - passages.place(pair.row)
        rows = []
        for row in range(first, len(passages)):
            if passages.document(row) != document:
                break
            if row not in passages.deleted and self.is_negative(pair, row):
                rows.append(row)
        return rows

    def is_negative(self, pair: ClozePair, row: int) -> bool:
        """Whether a passage does not answer the query of a pair: it is not its block or a copy,
        does not contain the answer and, if the query is a title, is of another document."""
        passages = self.passages
        if row == pair.row or passages.text_hash(row) == passages.text_hash(pair.row):
            return False
        if pair.is_title:
            return passages.document(row) != passages.document(pair.row)
        words = self.collator.wordpieces
        return not any(words.find(part, pair.answer_ids, whole_words=False) for part in self.collator.passage(row))
