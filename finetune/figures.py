"""The figures of an evaluation: means with intervals, computed from a record per question."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realm.runtime.bootstrap import bootstrap_interval

RECALL_DEPTHS = (1, 5, 20)
"""Depths k of the recall figures."""
CONVENTIONS = {
    "em": "SQuAD normalization; a pattern must match the whole prediction",
    "recall@k": "the top k contain an answer, by whole tokens (DPR)",
    "substring_recall@k": "the top k contain an answer as a substring (ORQA)",
    "exact_recall@k": "the top k contain the document that the question was asked about; "
    "questions without one are not counted",
    "mrr": "mean reciprocal rank of that document, 0 if it was not retrieved",
    "ceiling": "any passage of the corpus contains an answer, by the rule of recall@k",
    "interval": "95 % percentile bootstrap over questions, 1,000 resamples",
}

Figures = dict[str, float]
Intervals = dict[str, tuple[float, float]]
Record = dict[str, Any]
_RANKS = (("rank_of_answer", "recall"), ("rank_of_substring", "substring_recall"), ("rank_of_document", "exact_recall"))


def summarize(records: Sequence[Record], depths: Sequence[int], seed: int) -> tuple[Figures, Intervals]:
    """Means in percent, each over the records that have the value, and bootstrap intervals."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in values_of(record, depths).items():
            columns.setdefault(name, []).append(value)
    figures = {name: percent(values) for name, values in columns.items()}
    intervals: Intervals = {}
    for name, values in columns.items():
        low, high = bootstrap_interval(np.array(values), seed)
        intervals[name] = (100.0 * low, 100.0 * high)
    return figures | {"count": float(len(records))}, intervals


def values_of(record: Mapping[str, Any], depths: Sequence[int]) -> dict[str, float]:
    """The figures of one question, each between 0 and 1; only those that its record has."""
    names = ("em", "f1", "random_passage_em", "oracle_em")
    values = {name: float(record[name]) for name in names if name in record}
    for field, name in _RANKS:
        if field in record:
            values |= {f"{name}@{k}": float(_within(record[field], k)) for k in depths}
    if "rank_of_document" in record:
        rank = record["rank_of_document"]
        values["mrr"] = 0.0 if rank is None else 1.0 / float(rank)
    return values


def rank_of_first(hits: Sequence[bool]) -> int | None:
    """Rank of the first hit, counted from 1; None if there is none."""
    return hits.index(True) + 1 if True in hits else None


def _within(rank: int | None, k: int) -> bool:
    return rank is not None and rank <= k


def percent(values: Sequence[float] | np.ndarray) -> float:
    """Mean as a percentage."""
    return 100.0 * float(np.mean(np.asarray(values, dtype=np.float64)))
