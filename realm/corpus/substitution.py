"""Entity substitution: replaces the span to predict with another span of the same type.

The reader then cannot answer from memory; it has to copy from the passage.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from realm.corpus.prepared import PreparedCorpus
from realm.text.inputs import IntArray, Wordpieces

SpanPool: TypeAlias = dict[int, list[IntArray]]
"""Distinct spans as wordpieces, by type (an index into SPAN_TYPES)."""


def span_pool(corpora: Sequence[PreparedCorpus], max_span_tokens: int, max_blocks: int = 100_000) -> SpanPool:
    """Collect the distinct spans by type from at most `max_blocks` blocks of each corpus.

    Include the passages as well as the statements: the reader does not learn to copy spans that are
    never used as substitutes.
    """
    seen: dict[int, dict[bytes, IntArray]] = {}
    for corpus in corpora:
        for row in range(min(len(corpus), max_blocks)):
            ids = corpus.text_ids(row)
            for start, end, kind in zip(*corpus.spans(row), strict=True):
                if end - start <= max_span_tokens:
                    span = np.array(ids[start:end])
                    seen.setdefault(int(kind), {})[span.tobytes()] = span
    return {kind: list(spans.values()) for kind, spans in seen.items()}


def replace_span(text_ids: IntArray, old: IntArray, new: IntArray, wordpieces: Wordpieces) -> IntArray:
    """`text_ids` with every whole-word occurrence of `old` replaced with `new`."""
    parts, at = [], 0
    for start in wordpieces.find(text_ids, old):
        parts += [text_ids[at:start], new]
        at = start + len(old)
    return np.concatenate([*parts, text_ids[at:]]) if parts else text_ids
