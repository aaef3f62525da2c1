"""Embedding drift: how far the embeddings of a fixed set of reference passages have moved, and how
much the search results of a stale and a fresh index overlap.

Shape legend: P drift reference passages, K results, D embedding dimension.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from torch import nn

from index.encode import Encoder
from index.search import PassageIndex
from realm.corpus.collate import EMPTY, filled
from realm.models.precision import Precision
from realm.models.retriever import embed_no_grad
from realm.text.inputs import Wordpieces, pad_batch, token_budget_batches

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus

DRIFT_FILE = "probe.npy"
"""File in every index version with the embeddings of the drift reference passages, uncompressed."""
OVERLAP_AT = 8
"""Search results compared per reference query."""
_QUERY_WORDPIECES = 32


def drift_rows(num_passages: int, count: int) -> np.ndarray:
    """Rows of the drift reference passages, (P,) ascending; deterministic in both arguments."""
    return np.sort(np.random.default_rng(0).choice(num_passages, min(count, num_passages), replace=False))


def cosine_change(before_PD: np.ndarray, now_PD: np.ndarray) -> float:
    """Mean of 1 − cosine between the two embeddings of each passage."""
    dot_P = (before_PD * now_PD).sum(1)
    return float(np.mean(1.0 - dot_P / (np.linalg.norm(before_PD, axis=1) * np.linalg.norm(now_PD, axis=1))))


def overlap(stale_PK: np.ndarray, fresh_PK: np.ndarray) -> float:
    """Fraction of the fresh index's results that the stale index also finds.

    Queries without a result in the fresh index do not count; NaN if there are no others.
    """
    found = [(set(filled(stale)), set(filled(fresh))) for stale, fresh in zip(stale_PK, fresh_PK, strict=True)]
    fractions = [len(stale & fresh) / len(fresh) for stale, fresh in found if fresh]
    return float(np.mean(fractions)) if fractions else float("nan")


def measure_drift(
    stale: PassageIndex,
    stale_reference_PD: np.ndarray,
    fresh: faiss.Index,
    reference_PD: np.ndarray,
    encoder: Encoder,
    corpus: "PreparedCorpus",
) -> dict[str, Any]:
    """Compare the fresh index with a stale one.

    Returns `against` (name of the stale version), `cosine_change` of the reference passages, and
    `overlap@8` of the search results for the first words of each passage, embedded by the current
    query tower.
    """
    rows_P = drift_rows(corpus.base_rows, len(reference_PD))
    wordpieces = encoder.wordpieces
    queries = [wordpieces.query(corpus.text_ids(row), _QUERY_WORDPIECES) for row in rows_P.tolist()]
    ids_PL, mask_PL = pad_batch(queries, wordpieces.pad)
    device = next(encoder.retriever.parameters()).device
    encoder.retriever.eval()
    with torch.inference_mode():
        query_emb_PD = encoder.retriever.embed_queries(ids_PL.to(device), mask_PL.to(device)).float().cpu().numpy()
    k = min(OVERLAP_AT, len(corpus))
    stale_PK, fresh_PK = stale.search(query_emb_PD, k)[1], fresh.search(query_emb_PD, k)[1]
    fresh_PK[np.isin(fresh_PK, list(corpus.deleted))] = EMPTY
    return {
        "against": stale.version.name,
        "cosine_change": cosine_change(stale_reference_PD, reference_PD),
        f"overlap@{OVERLAP_AT}": overlap(stale_PK, fresh_PK),
    }


class DriftReference:
    """The drift reference passages as the trainer sees them: measures the drift of a tower since
    its last snapshot."""

    def __init__(
        self, corpus: "PreparedCorpus", wordpieces: Wordpieces, count: int, max_tokens: int, precision: Precision
    ) -> None:
        rows = drift_rows(corpus.base_rows, count).tolist()
        self.inputs = [wordpieces.passage(corpus.title_ids(row), corpus.text_ids(row), max_tokens) for row in rows]
        self.pad, self.precision = wordpieces.pad, precision
        self.snapshot_PD = np.zeros((0, 0), np.float32)
        """Embeddings of the reference passages at the last snapshot."""

    def embed(self, tower: nn.Module) -> np.ndarray:
        """Embed the reference passages, (P, D)."""
        parts: dict[int, np.ndarray] = {}
        for batch in token_budget_batches([len(ids) for ids in self.inputs], 4096):
            embeddings = embed_no_grad(
                tower, *pad_batch([self.inputs[number] for number in batch], self.pad), self.precision
            )
            parts.update(zip(batch.tolist(), embeddings, strict=True))
        return np.stack([parts[number] for number in range(len(self.inputs))])

    def snapshot(self, tower: nn.Module) -> None:
        """Store the current embeddings; `drift` is measured from them."""
        self.snapshot_PD = self.embed(tower)

    def drift(self, tower: nn.Module) -> float:
        """Mean of 1 − cosine between the embeddings at the last snapshot and now."""
        return cosine_change(self.snapshot_PD, self.embed(tower))


def gather_rows(shards: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Gather rows of a sharded matrix, (len(rows), D) float32."""
    ends = np.cumsum([len(shard) for shard in shards])
    shard_ids = np.searchsorted(ends, rows, side="right")
    return np.stack(
        [shards[i][row - (ends[i] - len(shards[i]))] for i, row in zip(shard_ids.tolist(), rows.tolist(), strict=True)]
    ).astype(np.float32)
