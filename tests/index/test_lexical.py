"""BM25 over a corpus: scores as a plain loop computes them, deleted rows, saving, stopping."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from lexical_corpus import WordCorpus, plain_bm25

from index.lexical import LexicalIndex, best_rows
from realm.text.terms import Terms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.mark.parametrize("deleted", [frozenset(), frozenset({0, 3, 39})], ids=["all rows", "some deleted"])
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.0, 0.0)])
def test_scores_equal_a_plain_loop(
    tokenizer: "PreTrainedTokenizerBase", tmp_path: Path, deleted: frozenset[int], k1: float, b: float
) -> None:
    terms, corpus = Terms(tokenizer, stemmer="english"), WordCorpus(len(tokenizer), deleted=deleted)
    built = LexicalIndex.build(corpus, terms, k1, b)  # type: ignore[arg-type]
    built.save(tmp_path)
    opened = LexicalIndex.open(tmp_path)
    assert len(built) == len(opened) == 40
    for row in range(0, 40, 3):
        query = [*terms(corpus.text_ids(row)), *terms(corpus.title_ids(row + 1 if row < 39 else 0)), "unheard"]
        score_N = opened.scores(query)
        assert score_N.dtype == np.float32 and score_N.shape == (40,)
        np.testing.assert_allclose(score_N, plain_bm25(corpus, terms, query, k1, b), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(score_N, built.scores(query))
        assert not score_N[list(deleted)].any()


def test_queries_without_a_known_term_and_corpora_without_terms(
    tokenizer: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    terms = Terms(tokenizer)
    lexical = LexicalIndex.build(WordCorpus(len(tokenizer)), terms, 1.5, 0.75)  # type: ignore[arg-type]
    assert not lexical.scores(["unheard"]).any() and not lexical.scores([]).any()
    empty = WordCorpus(len(tokenizer), num_rows=3, deleted=frozenset({1, 2}))  # the text of row 0 is empty
    empty._texts[0] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    LexicalIndex.build(empty, terms, 1.5, 0.75).save(tmp_path)  # type: ignore[arg-type]
    assert LexicalIndex.open(tmp_path).scores(["a"]).tolist() == [0.0, 0.0, 0.0]


def test_the_same_corpus_gives_the_same_files(tokenizer: "PreTrainedTokenizerBase", tmp_path: Path) -> None:
    for name in ("first", "second"):
        corpus, terms = WordCorpus(len(tokenizer)), Terms(tokenizer, stemmer="english")
        LexicalIndex.build(corpus, terms, 1.5, 0.75).save(tmp_path / name)  # type: ignore[arg-type]
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_build_can_be_stopped_in_each_of_its_passes(tokenizer: "PreTrainedTokenizerBase") -> None:
    calls = [0]

    def check() -> None:
        calls[0] += 1
        if calls[0] == limit:
            raise KeyboardInterrupt

    corpus, terms, limit = WordCorpus(len(tokenizer)), Terms(tokenizer), 0
    LexicalIndex.build(corpus, terms, 1.5, 0.75, check)  # type: ignore[arg-type]
    assert calls[0] >= 3, "term ids, document frequencies and scores are separate passes"
    for limit in range(1, calls[0] + 1):  # noqa: B007  (read by `check`)
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt):
            LexicalIndex.build(corpus, terms, 1.5, 0.75, check)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_best_rows_are_those_of_a_stable_sort(k: int) -> None:
    rng = np.random.default_rng(k)
    for _ in range(50):
        score_N = rng.integers(0, 4, 12).astype(np.float32)
        expected = [row for row in sorted(range(12), key=lambda row: (-score_N[row], row)) if score_N[row] > 0][:k]
        assert best_rows(score_N, k).tolist() == expected
