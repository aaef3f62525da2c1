"""Retrieve small, read long: a block together with what stands around it in its document
(`corpus.context_tokens`).

The index holds blocks; the reader may read whole neighbouring blocks before and behind the
retrieved one. Retrieved blocks that stand in what is read for a better one of their document are
read once, with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realm.corpus.prepared import PreparedCorpus
from realm.text.blocks import NUM_SPECIAL_TOKENS
from realm.text.inputs import IntArray


@dataclass(frozen=True)
class Context:
    """What is read for a block: consecutive blocks of one document."""

    rows: tuple[int, ...]
    """Their rows, in the order of the document."""
    starts: tuple[int, ...]
    """Where each of them begins in `text_ids`."""
    text_ids: IntArray
    """Their wordpieces, put together."""


class Contexts:
    """Contexts of a corpus."""

    def __init__(self, corpus: PreparedCorpus, context_tokens: int) -> None:
        """`context_tokens` bounds a context as `corpus.block_tokens` bounds a block, title and
        special tokens included; 0: the block alone."""
        self.corpus, self.context_tokens = corpus, context_tokens

    def around(self, row: int) -> Context:
        """The block of `row` and its neighbours, taken in turn from behind and from before while
        they fit."""
        rows = [row] if not self.context_tokens else self._neighbourhood(row)
        texts = [self.corpus.text_ids(other) for other in rows]
        ends = np.cumsum([len(text) for text in texts]).tolist()
        return Context(tuple(rows), (0, *ends[:-1]), texts[0] if len(texts) == 1 else np.concatenate(texts))

    def _neighbourhood(self, row: int) -> list[int]:
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

    def share(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """For each place in `rows`, best first, the first place whose context holds that row:
        itself, or one it is read with; -1 for rows below 0."""
        chosen: list[tuple[int, tuple[int, ...]]] = []
        places = []
        for place, row in enumerate(rows):
            found = -1 if row < 0 else next((other for other, held in chosen if row in held), place)
            if found == place:
                chosen.append((place, self.around(row).rows))
            places.append(found)
        return places
