"""How far embeddings have moved: a fixed set of probe passages, embedded now and before, and what
stale and fresh indexes find for them.

Shape legend: P probe passages, K results, D dimension of the embeddings.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from torch import nn

from index.encode import Encoder
from index.search import PassageIndex
from realm.models.precision import Precision
from realm.models.retriever import embed_no_grad
from realm.text.inputs import Wordpieces, pad_batch, token_budget_batches

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus

DRIFT_FILE = "probe.npy"
"""Embeddings of the probe passages, exact whatever the index does to its own, in every index
version."""
OVERLAP_AT = 8
"""Results per probe query that are compared."""
_QUERY_WORDPIECES = 32


def drift_rows(num_passages: int, count: int) -> np.ndarray:
    """Rows of the probe passages, (P,) ascending: the same for the same numbers."""
    return np.sort(np.random.default_rng(0).choice(num_passages, min(count, num_passages), replace=False))


def cosine_change(before_PD: np.ndarray, now_PD: np.ndarray) -> float:
    """Mean of 1 − cosine between the two embeddings of each passage."""
    dot_P = (before_PD * now_PD).sum(1)
    return float(np.mean(1.0 - dot_P / (np.linalg.norm(before_PD, axis=1) * np.linalg.norm(now_PD, axis=1))))


def overlap(stale_PK: np.ndarray, fresh_PK: np.ndarray) -> float:
    """Share of what the fresh index finds that the stale one finds too."""
    return float(
        np.mean(
            [
                len(set(stale) & set(fresh)) / len(set(fresh))
                for stale, fresh in zip(stale_PK.tolist(), fresh_PK.tolist(), strict=True)
            ]
        )
    )


def measure_drift(
    stale: PassageIndex,
    stale_reference_PD: np.ndarray,
    fresh: faiss.Index,
    reference_PD: np.ndarray,
    encoder: Encoder,
    corpus: "PreparedCorpus",
) -> dict[str, Any]:
    """`cosine_change` of the probe passages since `stale`, and `overlap@8` of what the two
    indexes find for the first words of each, embedded by the query tower of today."""
    rows_P = drift_rows(corpus.base_rows, len(reference_PD))
    words = encoder.wordpieces
    queries = [words.query(corpus.text_ids(row), _QUERY_WORDPIECES) for row in rows_P.tolist()]
    ids_PL, mask_PL = pad_batch(queries, words.pad)
    device = next(encoder.retriever.parameters()).device
    encoder.retriever.eval()
    with torch.inference_mode():
        query_emb_PD = encoder.retriever.embed_queries(ids_PL.to(device), mask_PL.to(device)).float().cpu().numpy()
    depth = min(OVERLAP_AT, len(corpus))
    found = overlap(stale.search(query_emb_PD, depth)[1], fresh.search(query_emb_PD, depth)[1])
    return {
        "against": stale.version.name,
        "cosine_change": cosine_change(stale_reference_PD, reference_PD),
        f"overlap@{OVERLAP_AT}": found,
    }


class DriftReference:
    """The trainer's view: the probe passages' inputs, and how far a tower has moved from where
    it was marked last."""

    def __init__(
        self, corpus: "PreparedCorpus", words: Wordpieces, count: int, max_tokens: int, precision: Precision
    ) -> None:
        rows = drift_rows(corpus.base_rows, count).tolist()
        self.inputs = [words.passage(corpus.title_ids(row), corpus.text_ids(row), max_tokens) for row in rows]
        self.pad, self.precision = words.pad, precision
        self.snapshot_PD = np.zeros((0, 0), np.float32)
        """Embeddings at the last mark."""

    def embed(self, tower: nn.Module) -> np.ndarray:
        """(P, D)."""
        parts: dict[int, np.ndarray] = {}
        for batch in token_budget_batches([len(ids) for ids in self.inputs], 4096):
            embeddings = embed_no_grad(
                tower, *pad_batch([self.inputs[number] for number in batch], self.pad), self.precision
            )
            parts.update(zip(batch.tolist(), embeddings, strict=True))
        return np.stack([parts[number] for number in range(len(self.inputs))])

    def snapshot(self, tower: nn.Module) -> None:
        """Measure from here on."""
        self.snapshot_PD = self.embed(tower)

    def drift(self, tower: nn.Module) -> float:
        """Mean of 1 − cosine since the last mark."""
        return cosine_change(self.snapshot_PD, self.embed(tower))


def gather_rows(shards: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Rows of a matrix that lies in shards, (len(rows), D) float32."""
    ends = np.cumsum([len(shard) for shard in shards])
    number = np.searchsorted(ends, rows, side="right")
    return np.stack(
        [shards[n][row - (ends[n] - len(shards[n]))] for n, row in zip(number.tolist(), rows.tolist(), strict=True)]
    ).astype(np.float32)
