"""Candidates of REALM by fused retrieval: scores, the own passage of a sentence, resume."""

from pathlib import Path

import numpy as np
import pytest

from index.frozen import frozen_index
from index.fusion import Fusion
from index.search import PassageIndex
from pretrain.collate import MaskedCollator
from pretrain.masked_span_eval import evaluate_masked_spans, sample_items
from pretrain.realm import FixedIndex, RealmPretraining
from pretrain.search import FrozenSearch
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever, initial_reader
from tests.tiny import prepared_run

WEIGHT = 2.0


@pytest.fixture(scope="module", params=["own statements", "passages as statements"])
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    corpus = {} if request.param == "own statements" else {"statements": None}
    fusion = {"method": "weighted", "weight": WEIGHT}
    return prepared_run(tmp_path_factory.mktemp("towns"), corpus=corpus, fusion=fusion)


@pytest.fixture(scope="module")
def index(run: Run) -> PassageIndex:
    retriever = build_initial_retriever(run)
    return frozen_index(run.folder, retriever, run.passages, run.config.refresh, lambda line: None, Fusion.of(run))


def open_stage(run: Run, index: PassageIndex) -> RealmPretraining:
    retriever = load_retriever(build_initial_retriever(run))[0]
    return RealmPretraining(run, retriever, initial_reader(run, "reader_pretraining"), FixedIndex(index))


def expected_lexical(run: Run, index: PassageIndex, example) -> np.ndarray:
    """weight · BM25 / max BM25 of all passages; the sentence's own passage has none."""
    assert index.lexical is not None
    score_N = index.lexical.scores(run.terms(example.masked_ids(run.wordpieces.mask)))
    if run.statements is run.passages:
        score_N[example.row] = 0.0
    return WEIGHT * score_N / (score_N.max() or 1.0)


def test_a_batch_has_the_scores_of_its_candidates(run: Run, index: PassageIndex) -> None:
    stage = open_stage(run, index)
    batch = stage.batch(0)
    examples = stage.candidates.examples(0, stage.config.batch_size)
    assert batch.lexical_BN.shape == batch.candidate_BN.shape and not batch.lexical_BN[:, 0].any()
    inputs = {tuple(run.collator.passage_inputs([run.collator.passage(row)])[0][0].tolist()): row for row in range(12)}
    for b, example in enumerate(examples):
        lexical_N = expected_lexical(run, index, example)
        for n in range(1, batch.candidate_BN.shape[1]):
            ids = batch.passage_ids_UL[batch.candidate_BN[b, n]]
            row = inputs.get(tuple(ids[: int(batch.passage_mask_UL[batch.candidate_BN[b, n]].sum())].tolist()))
            expected = lexical_N[row] if batch.valid_BN[b, n] and row is not None else 0.0
            assert batch.lexical_BN[b, n].item() == pytest.approx(expected, rel=1e-5)
    assert batch.lexical_BN.any() and batch.lexical_BN.max() <= WEIGHT
    stage.close()


def test_pending_candidates_and_their_scores_are_resumed(run: Run, index: PassageIndex, tmp_path: Path) -> None:
    stage = open_stage(run, index)
    stage.batch(0)
    stage.candidates.save(tmp_path)
    expected = stage.batch(1)
    resumed = open_stage(run, index)
    resumed.candidates.restore(tmp_path, 1)
    found = resumed.batch(1)
    assert found.lexical_BN.tolist() == expected.lexical_BN.tolist() and expected.lexical_BN.any()
    assert found.candidate_BN.tolist() == expected.candidate_BN.tolist()
    for opened in (stage, resumed):
        opened.close()


def test_the_best_passages_of_a_frozen_retriever_are_fused(run: Run, index: PassageIndex) -> None:
    collator = MaskedCollator(run.collator, 2)
    search = FrozenSearch.open(run, build_initial_retriever(run), collator)
    examples = [item.example for item in sample_items(run, 9)]
    found = search(examples, 4)
    retriever = load_retriever(build_initial_retriever(run))[0]
    for example, rows, scores in zip(examples, found, search.scores(examples, found), strict=True):
        lexical_N = expected_lexical(run, index, example)
        ids_BL, mask_BL = collator.queries([example])
        query_emb_D = retriever.eval().embed_queries(ids_BL, mask_BL)[0].detach().numpy()
        assert rows.tolist() == np.argsort(-(index.embeddings(np.arange(12)) @ query_emb_D + lexical_N))[:4].tolist()
        np.testing.assert_allclose(scores, lexical_N[rows], rtol=1e-5)


def test_masked_span_evaluation_reads_with_fused_scores(run: Run, index: PassageIndex) -> None:
    reader = initial_reader(run, "reader_pretraining")
    figures = evaluate_masked_spans(run, sample_items(run, 9), build_initial_retriever(run), reader)
    assert 0.0 < figures["null_mass"] < 100.0 / run.config.pretrain.candidates, "BM25 raises the others"
