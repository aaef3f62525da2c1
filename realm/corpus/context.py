"""Retrieve small, read long: a retrieved block with its neighbors (`corpus.context_tokens`).

The index contains blocks. The reader can read a context: the retrieved block together with whole
neighboring blocks of its document. If a retrieved block is already part of the context of a
higher-ranked block, it is read once, as part of that context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realm.corpus.prepared import PreparedCorpus
from realm.text.blocks import NUM_SPECIAL_TOKENS
from realm.text.inputs import IntArray


@dataclass(frozen=True)
class Context:
    """Consecutive blocks of one document that the reader reads together."""

    rows: tuple[int, ...]
    """Rows of the blocks, in document order."""
    starts: tuple[int, ...]
    """Offset of each block in `text_ids`."""
    text_ids: IntArray
    """Concatenated wordpieces of the blocks."""


class Contexts:
    """The contexts of the blocks of a corpus."""

    def __init__(self, corpus: PreparedCorpus, context_tokens: int) -> None:
        """`context_tokens`: maximum number of wordpieces of a context; 0: the block alone.

        Title and special tokens are included, as in `corpus.block_tokens` for a block.
        """
        self.corpus, self.context_tokens = corpus, context_tokens

    def around(self, row: int) -> Context:
        """Context of `row`: its block and the neighbors that fit, alternately after and before."""
        rows = [row] if not self.context_tokens else self._rows_around(row)
        texts = [self.corpus.text_ids(other) for other in rows]
        ends = np.cumsum([len(text) for text in texts]).tolist()
        return Context(tuple(rows), (0, *ends[:-1]), texts[0] if len(texts) == 1 else np.concatenate(texts))

    def _rows_around(self, row: int) -> list[int]:
        corpus, rows, last, growing = self.corpus, [row], {1: row, -1: row}, [1, -1]
        room = self.context_tokens - NUM_SPECIAL_TOKENS - len(corpus.title_ids(row)) - len(corpus.text_ids(row))
        while growing:
            for step in tuple(growing):
                other = last[step] + step
                if (
                    0 <= other < len(corpus)
                    and corpus.document(other) == corpus.document(row)
                    and len(corpus.text_ids(other)) <= room
                ):
                    room -= len(corpus.text_ids(other))
                    rows.append(other)
                    last[step] = other
                else:
                    growing.remove(step)
        return sorted(rows)

    def read_slots(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """For each slot of `rows` (best first), the first slot whose context contains that row.

        This is the slot itself unless the row is part of the context of a higher-ranked row; -1 for
        negative rows (empty slots).
        """
        contexts: list[tuple[int, tuple[int, ...]]] = []
        slots = []
        for slot, row in enumerate(rows):
            found = -1 if row < 0 else next((other for other, context in contexts if row in context), slot)
            if found == slot:
                contexts.append((slot, self.around(row).rows))
            slots.append(found)
        return slots
