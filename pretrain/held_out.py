"""What a retriever finds of the held-out documents, without labels.

Questions are made from sentences of held-out documents (`held_out_questions`). Each is searched in
two ways: for its *source*, the passage that its sentence is from, and, among all passages but the
source, for any *supporting* passage, which holds the answer and a second entity of the question in
other words. Ranks are exact, among the passages of the pool, by the inner product, by BM25, and by
both.

Weights of BM25 are chosen, and fused retrievers compared, by supporting passages. A question shares
nearly all of its words with its source: BM25 alone is then best, which it is not for questions that
people write. Mean reciprocal ranks in percent of all-MiniLM-L6-v2, by weight of BM25, on SQuAD's
paragraphs among 27,000 passages and on 2,247 blocks of Amazon reviews, where support is rarer and
weaker, because the text names few entities:

| | 0 | 0.2 | 0.4 | 0.6 | 0.8 | 1.3 | 2.5 | BM25 alone |
|---|---|---|---|---|---|---|---|---|
| SQuAD, written questions | 65.3 | 78.8 | 81.3 | 81.9 | 81.6 | 81.5 | 80.2 | 77.5 |
| SQuAD, supporting passages | 29.3 | 36.3 | 38.1 | 38.3 | 38.6 | 38.1 | 37.0 | 36.1 |
| SQuAD, sources | 62.1 | 86.4 | 93.7 | 96.0 | 96.9 | 97.3 | 97.9 | 98.0 |
| reviews, written questions | 25.7 | 37.1 | 41.2 | 42.3 | 42.6 | 42.5 | 41.9 | 39.9 |
| reviews, supporting passages | 14.6 | 18.5 | 21.0 | 22.5 | 23.2 | 24.3 | 25.0 | 26.1 |
| reviews, sources | 43.2 | 75.8 | 89.8 | 93.9 | 95.2 | 96.0 | 96.4 | 96.6 |

Training on made questions also raises the rank of sources more than that of others: after 30 steps
of inverse cloze with questions, the reciprocal rank without BM25 rose by 5.1 for sources, by 0.7
(95 % interval -0.0 to 1.4) for written questions, and by -0.3 (-1.4 to 1.0) for supporting
passages.

Shape legend: B questions, P passages of the pool, V ways of scoring, N passages of the corpus.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import draccus
import numpy as np

from index.encode import encode_passages, encoding_tower
from index.fusion import DEFAULT_WEIGHT, lexical_files, reciprocal_ranks
from index.lexical import LexicalIndex
from index.measurements import read_measurement, write_measurement
from pretrain.collate import MaskedCollator
from pretrain.held_out_questions import HeldOutQuestions, held_out_questions
from pretrain.search import embed_masked
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.runtime.distributed import local_device
from realm.runtime.telemetry import progress

MIN_QUESTIONS = 100
"""With fewer held-out questions nothing is measured; with fewer that have a supporting passage no
weight is tuned."""
RELATIVE_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0)
"""Weights of BM25 that are tried, in multiples of the spread of the inner products: the difference
of the largest and the mean one, on average over the questions (0.54 for SQuAD above). Larger ones,
nearly BM25 alone, are not best for written questions."""

Way = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores of passages, from their inner products and their BM25 scores divided by the largest
one."""


def measure_retriever(run: Run, retriever: Path) -> dict[str, Any] | None:
    """Measure a saved retriever with the held-out questions; None if there are too few.

    Returns `weight`, the best weight of BM25 (None if it is set in the config, or too few questions
    have a supporting passage), and `ranks` by target (`source`, `supporting`) and way of scoring
    (`dense`, `bm25`, `fused`): the rank of the first passage to find for each question, counted
    from 1, or None for questions without one. The result is kept in `RUN/held-out` and is not
    measured again. To be called on one rank.
    """
    if not run.config.held_out.share:
        return None
    identity, known = _identity(run), read_measurement(run.folder, retriever)
    if known is not None and known["identity"] == identity:
        return known if known["count"] >= MIN_QUESTIONS else None
    lexical = LexicalIndex.open(lexical_files(run))
    questions = held_out_questions(run, lexical)
    result: dict[str, Any] = {"identity": identity, "count": len(questions)}
    if len(questions) >= MIN_QUESTIONS:
        result |= _measured(run, retriever, questions, lexical)
    write_measurement(run.folder, retriever, result)
    return result if len(questions) >= MIN_QUESTIONS else None


def _identity(run: Run) -> dict[str, Any]:
    """What the figures of a retriever depend on besides the retriever."""
    config = run.config
    return {
        "passages": run.passages.fingerprint,
        "statements": run.statements.fingerprint,
        "held_out": draccus.encode(config.held_out),
        "fusion": draccus.encode(config.fusion),
        "tokens": [config.retriever.max_query_tokens, config.retriever.max_passage_tokens],
        "span_tokens": config.pretrain.max_span_tokens,
    }


def _measured(run: Run, folder: Path, questions: HeldOutQuestions, lexical: LexicalIndex) -> dict[str, Any]:
    """`weight` and `ranks` of the retriever saved in `folder`."""
    config, dense_BP = run.config.fusion, inner_products(run, folder, questions)
    spread = float((dense_BP.max(1) - dense_BP.mean(1)).mean())
    fixed = DEFAULT_WEIGHT if config.weight is None else config.weight
    weights = [fixed, *(spread * weight for weight in RELATIVE_WEIGHTS if config.weight is None)]
    ways: list[Way] = [lambda dense_P, lexical_P: dense_P, lambda dense_P, lexical_P: lexical_P]
    ways += [_weighted(weight) for weight in weights]
    if config.method == "ranks":
        ways.append(_by_ranks(config.rank_constant))
    terms = [run.terms(example.query_ids(run.wordpieces.mask)) for example in questions.examples]
    sources = [[row] if row >= 0 else [] for row in questions.source]
    targets = {"source": (sources, [-1] * len(terms)), "supporting": (questions.supporting, questions.source)}
    ranks = {
        name: exact_ranks(dense_BP, questions.pool, terms, lexical, rows, ignored, ways)
        for name, (rows, ignored) in targets.items()
    }
    best, known_BV = 0, ranks["supporting"][ranks["supporting"][:, 0] > 0]
    tuned = config.weight is None and len(known_BV) >= MIN_QUESTIONS
    if tuned:
        best = 1 + int((1.0 / known_BV[:, 3 : 2 + len(weights)]).mean(0).argmax())
    names = {"dense": 0, "bm25": 1, "fused": len(ways) - 1 if config.method == "ranks" else 2 + best}
    return {
        "weight": weights[best] if tuned else None,
        "ranks": {
            target: {name: [int(rank) or None for rank in rank_BV[:, v]] for name, v in names.items()}
            for target, rank_BV in ranks.items()
        },
    }


def _weighted(weight: float) -> Way:
    return lambda dense_P, lexical_P: dense_P + np.float32(weight) * lexical_P


def _by_ranks(constant: int) -> Way:
    def fused(dense_P: np.ndarray, lexical_P: np.ndarray) -> np.ndarray:
        lists = [np.argsort(-score_P, kind="stable") for score_P in (dense_P, lexical_P)]
        return reciprocal_ranks(np.arange(len(dense_P)), lists, constant)

    return fused


def inner_products(run: Run, folder: Path, questions: HeldOutQuestions) -> np.ndarray:
    """Inner products of the questions and the passages of the pool with a saved retriever, (B, P)
    float32."""
    retriever, refresh = load_retriever(folder)[0].to(local_device()).eval(), run.config.refresh
    collator = MaskedCollator(run.collator, 1)
    query_emb_BD = embed_masked(retriever.query_tower, questions.examples, collator, run.config.engine.precision)
    with progress("held-out", len(questions.pool), unit="passage", every_s=run.config.engine.log_every_s) as ticker:
        passage_emb_PD = encode_passages(
            encoding_tower(retriever, refresh.precision),
            run.passages,
            questions.pool,
            run.wordpieces,
            run.config.retriever.max_passage_tokens,
            refresh.token_budget,
            ticker.update,
        )
    return query_emb_BD @ passage_emb_PD.T


def exact_ranks(
    dense_BP: np.ndarray,
    pool: np.ndarray,
    terms: Sequence[Sequence[str]],
    lexical: LexicalIndex,
    targets: Sequence[Sequence[int]],
    ignored: Sequence[int],
    ways: Sequence[Way],
) -> np.ndarray:
    """Rank of the best target of each question by each way of scoring, counted from 1, (B, V); 0
    for questions without a target.

    `targets`, `pool`: rows, the pool ascending. The row `ignored[b]` (-1: none) is left out.
    """
    rank_BV = np.zeros((len(terms), len(ways)), np.int64)
    for b, rows in enumerate(targets):
        if not rows:
            continue
        score_N = lexical.scores(terms[b])
        if ignored[b] >= 0:
            score_N[ignored[b]] = 0.0
        kept_P = pool != ignored[b]
        lexical_P = (score_N / max(score_N.max(initial=0.0), np.float32(1e-9)))[pool[kept_P]]
        dense_P, at = dense_BP[b, kept_P], np.searchsorted(pool[kept_P], rows)
        for v, way in enumerate(ways):
            score_P = way(dense_P, lexical_P)
            rank_BV[b, v] = 1 + int((score_P > score_P[at].max()).sum())
    return rank_BV
