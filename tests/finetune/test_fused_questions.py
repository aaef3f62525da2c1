"""Questions with fused retrieval: what is retrieved, and p(z|x) in training and in answering."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.answer import Answerer
from finetune.questions import Question, load_questions
from finetune.train_reader import Finetuning
from finetune.train_retriever import RetrieverBatches, RetrieverFinetuning
from index.frozen import frozen_index
from index.fusion import Fusion
from index.search import PassageIndex
from realm.models.retriever import embed_no_grad
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever, initial_reader
from tests.tiny import prepared_run

WEIGHT, TEMPERATURE = 3.0, 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    retriever = {"projection": "none", "pooling": "mean", "temperature": TEMPERATURE, "max_query_tokens": 32}
    bert = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "max_positions": 96}
    return prepared_run(
        tmp_path_factory.mktemp("towns"),
        fusion={"method": "weighted", "weight": WEIGHT},
        retriever={**retriever, "bert": bert},
    )


@pytest.fixture(scope="module")
def index(run: Run) -> PassageIndex:
    retriever = build_initial_retriever(run)
    return frozen_index(run.folder, retriever, run.passages, run.config.refresh, lambda line: None, Fusion.of(run))


@pytest.fixture(scope="module")
def questions(run: Run) -> list[Question]:
    source = run.questions("train")
    assert source is not None
    return load_questions(source, run.passages, run.tokenizer, 32, quiet=True)


def expected_scores(run: Run, index: PassageIndex, question: Question) -> tuple[np.ndarray, np.ndarray]:
    """Inner products with all passages, and what fusion adds, in double precision."""
    tower = load_retriever(build_initial_retriever(run))[0].query_tower
    query_emb_D = embed_no_grad(tower, *run.collator.queries([question.ids]))[0].astype(np.float64)
    assert index.lexical is not None
    lexical_N = index.lexical.scores(run.terms(question.ids)).astype(np.float64)
    return index.embeddings(np.arange(12)) @ query_emb_D, WEIGHT * lexical_N / lexical_N.max()


def test_finetuning_reads_what_was_retrieved_and_scores_it_with_bm25(
    run: Run, index: PassageIndex, questions: list[Question]
) -> None:
    retriever = load_retriever(build_initial_retriever(run))[0]
    stage = Finetuning(run, retriever, initial_reader(run, "reader_pretraining"), index, questions)
    stage.batches.config = replace(stage.batches.config, read_gold=False)
    batch = stage.batch(0)
    rows_of = {tuple(index.embeddings(np.array([row]))[0].tolist()): row for row in range(12)}
    asked = {tuple(run.collator.queries([question.ids])[0][0].tolist()): question for question in questions}
    dense_first = 0
    for b, ids in enumerate(batch.query_ids_BL.tolist()):
        question = asked[tuple(token for token in ids if token != run.wordpieces.pad)]
        dense_N, lexical_N = expected_scores(run, index, question)
        order = np.argsort(-(dense_N + lexical_N))
        retrieved = [rows_of[tuple(emb.tolist())] for emb in batch.passage_emb_BKD[b]]
        read = [rows_of[tuple(emb.tolist())] for emb in batch.read_emb_BND[b]]
        assert retrieved == order[:6].tolist() and read == order[:2].tolist()
        np.testing.assert_allclose(batch.lexical_BK[b], lexical_N[retrieved], rtol=1e-5)
        np.testing.assert_allclose(batch.read_lexical_BN[b], lexical_N[read], rtol=1e-5)
        dense_first += retrieved[0] != int(dense_N.argmax())
    assert dense_first, "otherwise BM25 changes nothing here"
    with torch.no_grad():
        query_emb_BD = retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
        log_p_BK = stage.module.retriever.score(query_emb_BD, batch.passage_emb_BKD, batch.lexical_BK).log_softmax(-1)
        losses = stage.module.eval()(batch)
    loss, count = 0.0, 0
    for b in range(len(query_emb_BD)):
        scores = [
            (float(query_emb_BD[b] @ emb) + float(extra)) / TEMPERATURE
            for emb, extra in zip(batch.passage_emb_BKD[b], batch.lexical_BK[b], strict=True)
        ]
        total = sum(map(math.exp, scores))
        p_K = [math.exp(score) / total for score in scores]
        np.testing.assert_allclose(log_p_BK[b].exp(), p_K, rtol=1e-4)
        relevant = [p for p, has_answer in zip(p_K, batch.has_answer_BK[b].tolist(), strict=True) if has_answer]
        if relevant:
            loss, count = loss - math.log(sum(relevant)), count + 1
    assert losses["retriever_loss"].item() == pytest.approx(loss / count, rel=1e-4)


def test_hard_negatives_are_those_of_fused_retrieval(run: Run, index: PassageIndex, questions: list[Question]) -> None:
    miner = load_retriever(build_initial_retriever(run))[0]
    batches: RetrieverBatches = RetrieverFinetuning._build(run, index, miner, miner, questions).batches
    for question, rows in zip(questions, batches.retrieved, strict=True):
        assert rows.tolist() == np.argsort(-sum(expected_scores(run, index, question)))[:6].tolist()


def test_answering_retrieves_and_weighs_passages_as_training_does(
    run: Run, index: PassageIndex, questions: list[Question], tmp_path: Path
) -> None:
    answerer = Answerer(run, "initial")
    assert answerer.model is None and answerer.index.version == index.version
    rows = answerer.retrieve(questions, 5)
    expected = np.array([sum(expected_scores(run, index, question)) for question in questions])
    assert rows.tolist() == np.argsort(-expected, axis=1)[:, :5].tolist()
    batch = answerer.collator.batch(questions, answerer.collator.queries(questions), rows, rows)
    answerer.model = Finetuning.open_for_timing(run, index).module.eval()  # type: ignore[assignment]
    with torch.no_grad():
        query_emb_BD = answerer.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
        _, read_score_BN = answerer.model.score_spans(batch, torch.zeros(batch.allowed_QLW.shape), query_emb_BD)
    expected_BN = np.take_along_axis(expected, rows, 1) / TEMPERATURE
    np.testing.assert_allclose(read_score_BN, expected_BN, rtol=1e-4, atol=1e-4)
    dense = Answerer(Run(run.folder, replace(run.config, fusion=replace(run.config.fusion, method="none"))), "initial")
    inner = np.array([expected_scores(run, index, question)[0] for question in questions])
    assert dense.retrieve(questions, 5).tolist() == np.argsort(-inner, axis=1)[:, :5].tolist()
