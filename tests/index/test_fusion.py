"""Fused retrieval: equal to brute force over all rows in double precision."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from lexical_corpus import WordCorpus, plain_bm25

from index import fusion as module
from index.fusion import DEFAULT_WEIGHT, Fusion
from index.lexical import LexicalIndex
from realm.text.terms import Terms
from realm.training.fusion_section import FusionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N, D, B = 40, 6, 9
DELETED = frozenset({2, 11, 30})


class Setup:
    """A corpus, random embeddings, BM25 and queries; implements `index.interface.Index`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", deleted: frozenset[int] = DELETED) -> None:
        rng = np.random.default_rng(1)
        self.terms, self.corpus = Terms(tokenizer, stemmer="english"), WordCorpus(len(tokenizer), N, deleted)
        self.emb_ND = rng.standard_normal((N, D)).astype(np.float32)
        self.query_emb_BD = rng.standard_normal((B, D)).astype(np.float32)
        self.lexical = LexicalIndex.build(self.corpus, self.terms, 1.5, 0.75)  # type: ignore[arg-type]
        self.query_ids = [self.corpus.text_ids(row)[:6] for row in range(3, 3 + B - 1)]
        self.query_ids.append(np.array([tokenizer.mask_token_id]))  # no term

    def __len__(self) -> int:
        return N

    def search(self, query_emb_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        score_BN = query_emb_BD @ self.emb_ND.T
        score_BN[:, list(self.corpus.deleted)] = -np.inf
        row_BK = np.argsort(-score_BN, axis=1, kind="stable")[:, :k]
        score_BK = np.take_along_axis(score_BN, row_BK, 1)
        return score_BK, np.where(np.isfinite(score_BK), row_BK, -1)

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        return self.emb_ND[rows]

    def close(self) -> None:
        pass

    def fusion(self, method: Literal["none", "weighted", "ranks"], **changes: float) -> Fusion:
        return Fusion(FusionConfig(method, **changes), self.terms)  # type: ignore[arg-type]

    def lexical_BN(self, weight: float, own_rows: list[int] | None = None) -> np.ndarray:
        """weight · BM25 / max BM25 by plain loops."""
        score_BN = np.zeros((B, N))
        for b, ids in enumerate(self.query_ids):
            score_BN[b] = plain_bm25(self.corpus, self.terms, self.terms(ids), 1.5, 0.75)
            if own_rows is not None:
                score_BN[b, own_rows[b]] = 0.0
            score_BN[b] *= weight / (score_BN[b].max() or 1.0)
        return score_BN

    def dense_BN(self) -> np.ndarray:
        return self.query_emb_BD.astype(np.float64) @ self.emb_ND.T.astype(np.float64)

    def ranked(self, score_BN: np.ndarray) -> np.ndarray:
        """Rows that are not deleted by descending score."""
        score_BN = score_BN.copy()
        score_BN[:, list(self.corpus.deleted)] = -np.inf
        return np.argsort(-score_BN, axis=1, kind="stable")[:, : N - len(self.corpus.deleted)]


@pytest.fixture(scope="module")
def setup(tokenizer: "PreTrainedTokenizerBase") -> Setup:
    return Setup(tokenizer)


def test_none_is_the_search_of_the_index(setup: Setup) -> None:
    expected = setup.search(setup.query_emb_BD, 5)[1]
    for fusion in (Fusion(), setup.fusion("none")):
        np.testing.assert_array_equal(fusion.retrieve(setup, setup.query_emb_BD, setup.query_ids, 5), expected)
        assert not fusion.scores(setup, setup.query_ids, expected).any()


@pytest.mark.parametrize("weight", [0.0, 0.5, 4.0, 1000.0])
@pytest.mark.parametrize("k", [1, 5, N])
def test_weighted_equals_brute_force_over_all_rows(setup: Setup, weight: float, k: int) -> None:
    fusion = setup.fusion("weighted", weight=weight)
    found_BK = fusion.retrieve(setup, setup.query_emb_BD, setup.query_ids, k)
    expected_BK = setup.ranked(setup.dense_BN() + setup.lexical_BN(weight))[:, :k]
    np.testing.assert_array_equal(found_BK[:, : expected_BK.shape[1]], expected_BK)
    assert (found_BK[:, expected_BK.shape[1] :] < 0).all(), "deleted rows are never found"


def test_a_long_corpus_is_ranked_within_the_union_of_both_lists(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_DEPTH", 6)
    score_BN = setup.dense_BN() + setup.lexical_BN(2.0)
    found_BK = setup.fusion("weighted", weight=2.0).retrieve(setup, setup.query_emb_BD, setup.query_ids, 4)
    for b in range(B):
        words = [row for row in setup.ranked(setup.lexical_BN(2.0))[b, :6] if setup.lexical_BN(2.0)[b, row] > 0]
        union = sorted({*setup.ranked(setup.dense_BN())[b, :6].tolist(), *words}, key=lambda row: -score_BN[b, row])
        assert found_BK[b].tolist() == union[:4]


def test_scores_complete_the_inner_products(setup: Setup) -> None:
    row_BK = np.array([[3, -1, b, -2] for b in range(B)])
    scores = setup.fusion("weighted").scores(setup, setup.query_ids, row_BK)
    assert scores.dtype == np.float32
    lexical_BN = setup.lexical_BN(DEFAULT_WEIGHT)
    expected = [[lexical_BN[b, 3], 0.0, lexical_BN[b, b], 0.0] for b in range(B)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert not setup.fusion("ranks").scores(setup, setup.query_ids, row_BK).any()


def test_the_own_passage_of_a_query_is_ignored_by_bm25(setup: Setup) -> None:
    own = [*range(3, 3 + B - 1), -1]
    fusion = setup.fusion("weighted", weight=3.0)
    found_BK = fusion.retrieve(setup, setup.query_emb_BD, setup.query_ids, N - len(DELETED), own)
    lexical_BN = setup.lexical_BN(3.0, own)
    np.testing.assert_array_equal(found_BK, setup.ranked(setup.dense_BN() + lexical_BN))
    assert lexical_BN[0].max() == pytest.approx(3.0) and lexical_BN[0, 3] == 0.0
    np.testing.assert_allclose(
        fusion.scores(setup, setup.query_ids, np.tile(np.arange(N), (B, 1)), own), lexical_BN, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("constant", [0, 60])
def test_ranks_equal_plain_loops(setup: Setup, constant: int) -> None:
    found_BK = setup.fusion("ranks", rank_constant=constant).retrieve(setup, setup.query_emb_BD, setup.query_ids, 7)
    lexical_BN = setup.lexical_BN(1.0)
    for b in range(B):
        scores: dict[int, float] = {}
        for rank, row in enumerate(setup.ranked(setup.dense_BN())[b].tolist(), 1):
            scores[row] = 1 / (constant + rank)
        words = [row for row in setup.ranked(lexical_BN)[b].tolist() if lexical_BN[b, row] > 0]
        for rank, row in enumerate(words, 1):
            scores[row] += 1 / (constant + rank)
        assert found_BK[b].tolist() == sorted(scores, key=lambda row: (-scores[row], row))[:7]


@pytest.mark.parametrize("method", ["weighted", "ranks"])
def test_without_a_known_term_the_order_is_that_of_the_inner_products(
    setup: Setup, method: Literal["weighted", "ranks"]
) -> None:
    found_BK = setup.fusion(method).retrieve(setup, setup.query_emb_BD, setup.query_ids, 8)
    np.testing.assert_array_equal(found_BK[-1], setup.search(setup.query_emb_BD, 8)[1][-1])


def test_what_an_index_must_contain() -> None:
    dense, fused = Fusion(FusionConfig()), Fusion(FusionConfig("weighted"))
    assert dense.lexical == {} and dense.accepts({}) and dense.accepts(fused.lexical)
    assert fused.accepts(fused.lexical) and not fused.accepts({})
    assert Fusion(FusionConfig("ranks", weight=3.0, rank_constant=5)).lexical == fused.lexical
    for change in ({"k1": 1.2}, {"b": 0.4}, {"prefix": 5}, {"stemmer": "english"}):
        assert not fused.accepts(replace(fused.config, **change).lexical)
