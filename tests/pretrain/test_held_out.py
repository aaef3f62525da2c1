"""Held-out documents: which they are, the questions made from them, ranks, and the tuned weight."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest

from index.fusion import DEFAULT_WEIGHT, Fusion, open_lexical
from pretrain.held_out import exact_ranks, measure_retriever
from pretrain.held_out_questions import HeldOutQuestions, held_out_questions
from pretrain.masking import SpanSampler
from realm.app.held_out import answer_text, retrieval_values
from realm.corpus.prepared import PreparedCorpus
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever
from tests.tiny import prepared_run

HALF = {"share": 0.5, "pseudo_questions": {"min_words": 2, "min_frequent_share": 0.0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Half of the documents are held out; sentences are from statements."""
    return prepared_run(tmp_path_factory.mktemp("half"), held_out=HALF)


@pytest.fixture(scope="module")
def same_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Half of the documents are held out; sentences are from the passages, two blocks a
    document."""
    corpus = {"statements": None, "block_tokens": 24}
    return prepared_run(tmp_path_factory.mktemp("same"), held_out=HALF, corpus=corpus)


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.held_out.MIN_QUESTIONS", 5)


def test_documents_are_held_out_as_a_whole_by_their_text(same_run: Run) -> None:
    passages = same_run.passages
    held, kept = set(passages.held_out_rows.tolist()), set(passages.training_rows.tolist())
    assert held and kept and held.isdisjoint(kept) and held | kept == set(range(len(passages)))
    assert {passages.document(row) for row in held}.isdisjoint(passages.document(row) for row in kept)
    for share, expected in ((0.0, set()), (0.999999, held | kept)):
        assert set(PreparedCorpus.open(passages.path, share).held_out_rows.tolist()) == expected
    fewer = set(PreparedCorpus.open(passages.path, 0.3).held_out_rows.tolist())
    assert fewer < held, "a smaller share holds out some of the same documents"


def test_no_sampler_draws_from_held_out_documents(run: Run) -> None:
    assert set(SpanSampler(run.statements, 10, 30).rows.tolist()).isdisjoint(run.statements.held_out_rows.tolist())


def test_questions_are_from_held_out_documents_whatever_the_seed(run: Run, same_run: Run) -> None:
    for chosen in (run, same_run):
        questions = held_out_questions(chosen, open_lexical(chosen))
        again = held_out_questions(Run(chosen.folder, replace(chosen.config, seed=5)), open_lexical(chosen))
        assert len(questions) >= 5
        assert [example.question.tolist() for example in questions.examples] == [
            example.question.tolist() for example in again.examples
        ]
        held = set(chosen.statements.held_out_rows.tolist())
        assert {example.row for example in questions.examples} <= held
        for example in questions.examples:
            assert not chosen.wordpieces.find(example.question, example.span_ids)
            answer = chosen.tokenizer(answer_text(chosen, example), add_special_tokens=False)["input_ids"]
            assert answer == example.span_ids.tolist()
    assert all(example.row == row for example, row in zip(questions.examples, questions.source, strict=True))
    assert set(held_out_questions(run, open_lexical(run)).source) == {-1}


def test_supporting_passages_hold_the_answer_and_another_entity_but_not_the_sentence(run: Run) -> None:
    questions = held_out_questions(run, open_lexical(run))
    found = 0
    for example, rows in zip(questions.examples, questions.supporting, strict=True):
        others = [
            other
            for other in example.others
            if set(other.tolist()) <= set(example.question.tolist())
            and not run.tokenizer.decode(other).replace(" ", "").isdigit()
        ]
        expected = []
        for row in range(len(run.passages)):
            parts = run.collator.passage(row)
            if run.collator.contains(parts, example.span_ids) and any(
                run.collator.contains(parts, other) for other in others
            ):
                expected.append(row)
        assert rows == expected
        found += len(rows)
    assert found >= 3


def test_a_source_is_not_its_own_support(same_run: Run) -> None:
    questions = held_out_questions(same_run, open_lexical(same_run))
    assert all(row not in rows for row, rows in zip(questions.source, questions.supporting, strict=True))


def test_the_pool_has_all_passages_to_find(same_run: Run) -> None:
    held = replace(same_run.config.held_out, questions=6, passages=10)
    few = Run(same_run.folder, replace(same_run.config, held_out=held))
    questions = held_out_questions(few, open_lexical(few))
    assert len(questions) == 6 and len(questions.pool) == 10
    assert set(questions.source).union(*questions.supporting) <= set(questions.pool.tolist())
    assert (np.diff(questions.pool) > 0).all()


class Lexical:
    """BM25 scores that are given."""

    def __init__(self, score_BN: np.ndarray) -> None:
        self.score_BN = score_BN

    def scores(self, terms: Sequence[str]) -> np.ndarray:
        return self.score_BN[int(terms[0])].copy()


def test_ranks_are_those_of_a_plain_sort() -> None:
    rng = np.random.default_rng(0)
    B, N = 7, 30
    pool = np.sort(rng.choice(N, 20, replace=False))
    dense_BP = rng.normal(size=(B, 20)).astype(np.float32)
    score_BN = (rng.random((B, N)) * (rng.random((B, N)) < 0.5)).astype(np.float32)
    targets = [rng.choice(pool, rng.integers(0, 3), replace=False).tolist() for _ in range(B)]
    ignored = [int(rng.choice(np.setdiff1d(pool, rows))) if b % 2 else -1 for b, rows in enumerate(targets)]
    ways = [lambda d, _: d, lambda _, l: l, lambda d, l: d + 0.7 * l]  # noqa: E741
    found = exact_ranks(dense_BP, pool, [[str(b)] for b in range(B)], Lexical(score_BN), targets, ignored, ways)  # type: ignore[arg-type]
    for b in range(B):
        score_N = score_BN[b].copy()
        if ignored[b] >= 0:
            score_N[ignored[b]] = 0
        for v in range(3):
            scored = []
            for p, row in enumerate(pool.tolist()):
                bm25 = score_N[row] / score_N.max()
                if row != ignored[b]:
                    scored.append(([dense_BP[b, p], bm25, dense_BP[b, p] + np.float32(0.7) * bm25][v], row))
            best = max((score for score, row in scored if row in targets[b]), default=None)
            expected = 0 if best is None else 1 + sum(score > best for score, _ in scored)
            assert found[b, v] == expected


def measured(run: Run, monkeypatch: pytest.MonkeyPatch, good: bool) -> dict:
    """The measurement of a retriever that finds every supporting passage, or none."""

    def products(run: Run, folder: Path, questions: HeldOutQuestions) -> np.ndarray:
        rng = np.random.default_rng(0)
        dense_BP = rng.normal(size=(len(questions), len(questions.pool))).astype(np.float32)
        if good:
            for b, rows in enumerate(questions.supporting):
                dense_BP[b, np.searchsorted(questions.pool, rows)] = 50.0
        return dense_BP

    monkeypatch.setattr("pretrain.held_out.inner_products", products)
    rmtree(run.folder / "held-out", ignore_errors=True)
    result = measure_retriever(run, build_initial_retriever(run))
    assert result is not None
    return result


def test_the_weight_of_bm25_is_larger_for_a_worse_retriever(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = Run(run.folder, replace(run.config, fusion=replace(run.config.fusion, method="weighted")))
    good, bad = measured(fused, monkeypatch, True), measured(fused, monkeypatch, False)
    found = good["ranks"]["supporting"]
    assert set(found["dense"]) <= {1, None} and 1 in found["dense"]
    assert bad["weight"] > 2, "spread of a normal distribution among twelve, and BM25 finds all"
    assert bad["ranks"]["supporting"]["fused"].count(1) > bad["ranks"]["supporting"]["dense"].count(1)
    start = build_initial_retriever(fused)
    assert Fusion.of(fused, start).weight == bad["weight"]
    assert Fusion.of(fused).weight == Fusion.of(run, start).weight == DEFAULT_WEIGHT
    fixed = Run(run.folder, replace(fused.config, fusion=replace(fused.config.fusion, weight=0.25)))
    assert Fusion.of(fixed, start).weight == 0.25
    few = replace(fused.config.held_out, questions=4)
    monkeypatch.setattr("pretrain.held_out.MIN_QUESTIONS", 4)
    monkeypatch.setattr("pretrain.held_out_questions._SUPPORT_DEPTH", 0)
    assert measured(Run(run.folder, replace(fused.config, held_out=few)), monkeypatch, True)["weight"] is None


def test_a_retriever_is_measured_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    start = build_initial_retriever(run)
    first = measure_retriever(run, start)
    assert first is not None and first["ranks"]["supporting"]["bm25"]
    monkeypatch.setattr("pretrain.held_out.inner_products", None)
    assert measure_retriever(run, start) == first
    other = Run(run.folder, replace(run.config, held_out=replace(run.config.held_out, passages=8)))
    with pytest.raises(TypeError):
        measure_retriever(other, start)


def test_nothing_is_measured_with_few_questions_or_no_held_out_documents(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = build_initial_retriever(run)
    monkeypatch.setattr("pretrain.held_out.MIN_QUESTIONS", 1000)
    for share in (0.5, 0.0):
        config = replace(run.config, held_out=replace(run.config.held_out, share=share, questions=999))
        assert measure_retriever(Run(run.folder, config), start) is None


def test_recall_is_that_of_questions_with_a_passage_to_find() -> None:
    ranks = {"source": {"dense": [1, 4, 30, 2]}, "supporting": {"dense": [None, 6, None, 1]}}
    values = {name: column.mean() for name, column in retrieval_values(ranks)["dense"].items()}
    assert values["source_recall@1"] == 0.25 and values["source_recall@5"] == 0.75
    assert values["supporting_recall@5"] == 0.5 and values["supporting_recall@20"] == 1.0
    assert values["source_mrr"] == pytest.approx((1 + 1 / 4 + 1 / 30 + 1 / 2) / 4)
    assert "supporting_mrr" not in retrieval_values({"supporting": {"dense": [None]}}).get("dense", {})
