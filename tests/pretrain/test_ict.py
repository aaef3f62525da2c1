"""Inverse cloze: its queries, its blocks, hard negatives, and excluded passages."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from index.fusion import open_lexical
from pretrain.cloze_pairs import ClozePair, ClozePairs
from pretrain.hard_negatives import HardNegatives
from pretrain.ict import InverseClozeBatches
from realm.models.batches import PairBatch
from realm.run.folder import Run
from realm.training.sections import IctConfig, IctNegativesConfig
from tests.tiny import TOWNS, prepared_run

SIZE = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve documents of two blocks each; the first block has two sentences."""
    return prepared_run(
        tmp_path_factory.mktemp("tiny"),
        corpus={"block_tokens": 24},
        held_out={"share": 0.0},
        pseudo_questions={"min_words": 2, "min_frequent_share": 0.0},
    )


@pytest.fixture(scope="module")
def make(run: Run) -> Callable[..., InverseClozeBatches]:
    lexical = open_lexical(run)

    def batches(negatives: dict[str, int] | None = None, **changes: object) -> InverseClozeBatches:
        config = replace(run.config.ict, negatives=IctNegativesConfig(**(negatives or {})), **changes)
        chosen = Run(run.folder, replace(run.config, ict=config))
        hard = HardNegatives(run.collator, config.negatives, lexical, run.terms)
        return InverseClozeBatches(run.collator, ClozePairs.open(chosen), hard, config, 0)

    return batches


def drawn(batches: InverseClozeBatches, count: int = 200) -> list[ClozePair]:
    rng = np.random.default_rng(0)
    return [batches.pairs.draw(int(row), rng) for row in rng.choice(batches.pairs.rows, count)]


def is_question(pair: ClozePair) -> bool:
    return not pair.is_title and pair.query_ids.tolist() != pair.answer_ids.tolist()


def text(run: Run, ids: np.ndarray) -> str:
    return run.tokenizer.decode(ids)


def texts(run: Run, batch: PairBatch) -> list[str]:
    """The passages of a batch, between [CLS] and the last [SEP]."""
    return [
        run.tokenizer.decode(ids[mask.bool()][1:-1])
        for ids, mask in zip(batch.passage_ids_CL, batch.passage_mask_CL, strict=True)
    ]


def test_the_corpus_has_documents_of_two_blocks(run: Run) -> None:
    assert [run.passages.place(row) for row in range(4)] == [0, 1, 0, 1]
    assert len(run.passages) == 2 * len(TOWNS)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_the_sentence_of_a_question_is_cut_out_of_its_block(run: Run, make, keep: float) -> None:
    pairs = drawn(make(question_prob=1.0, keep_sentence_prob=keep))
    questions = [pair for pair in pairs if is_question(pair)]
    assert len(questions) > 100
    for pair in questions:
        assert not run.wordpieces.find(pair.query_ids, pair.answer_ids), "a question does not contain its answer"
        whole, (title, kept) = run.passages.text_ids(pair.row), pair.parts
        assert title.tolist() == run.passages.title_ids(pair.row).tolist()
        if keep:
            assert kept.tolist() == whole.tolist()
            continue
        # What was cut is one sentence, and it contains the answer and the words of the question.
        starts = [*run.passages.sentence_starts(pair.row).tolist(), len(whole)]
        cut = [
            whole[first:last]
            for first, last in itertools.pairwise(starts)
            if np.concatenate((whole[:first], whole[last:])).tolist() == kept.tolist()
        ]
        assert any(run.wordpieces.find(sentence, pair.answer_ids) for sentence in cut)


def test_shares_of_questions_titles_and_sentences(run: Run, make) -> None:
    pairs = drawn(make(question_prob=0.5, title_prob=0.3, keep_sentence_prob=0.0), 600)
    titles = [pair for pair in pairs if pair.is_title]
    assert 0.2 < len(titles) / 600 < 0.4
    for pair in titles:
        assert text(run, pair.query_ids).capitalize() in TOWNS
        assert pair.parts[0].size == 0, "the passage is read without the title that is asked for"
        assert pair.parts[1].tolist() == run.passages.text_ids(pair.row).tolist()
    asked = [pair for pair in pairs if is_question(pair)]
    assert 0.3 < len(asked) / 600 < 0.6


def test_hard_negatives_contain_no_answer_and_are_not_the_block(run: Run, make) -> None:
    batches = make({"lexical": 2, "document": 1}, question_prob=0.6, title_prob=0.2)
    rng = np.random.default_rng(0)
    same_document = by_words = 0
    for pair in drawn(batches):
        rows = batches.negatives.draw(pair, rng)
        assert len(rows) == 3
        for row in rows:
            title, ids = run.collator.passage(row)
            assert row != pair.row
            if pair.is_title:
                assert run.passages.document(row) != run.passages.document(pair.row)
            else:
                assert not run.wordpieces.find(title, pair.answer_ids)
                assert not run.wordpieces.find(ids, pair.answer_ids)
        same_document += run.passages.document(rows[2]) == run.passages.document(pair.row)
        words = set(run.terms(pair.query_ids))
        by_words += bool(words & set(run.terms(np.concatenate(run.collator.passage(rows[0])))))
    assert same_document > 100, "the other block of the document, unless it contains the answer"
    assert by_words > 150


def test_a_batch_has_the_same_size_whatever_negatives_are_found(run: Run, make) -> None:
    batches = make({"lexical": 1, "document": 2}, question_prob=0.5)
    batch, again = batches(3, SIZE), make({"lexical": 1, "document": 2}, question_prob=0.5)(3, SIZE)
    assert len(batch.passage_ids_CL) == 4 * SIZE
    assert torch.equal(batch.passage_ids_CL, again.passage_ids_CL), "a function of the step"
    assert torch.equal(batch.query_ids_BL, again.query_ids_BL)
    assert not torch.equal(batch.query_ids_BL, batches(4, SIZE).query_ids_BL)


def test_copies_of_a_query_s_block_are_excluded(run: Run, make) -> None:
    batches = make({"lexical": 1}, keep_sentence_prob=1.0, title_prob=0.5)
    excluded = 0
    for step in range(20):
        batch = batches(step, SIZE)
        blocks = texts(run, batch)
        for b in range(SIZE):
            is_title = (
                run.tokenizer.decode(batch.query_ids_BL[b][batch.query_mask_BL[b].bool()][1:-1]).capitalize() in TOWNS
            )
            for c, block in enumerate(blocks):
                if c == b:
                    assert not batch.excluded_BC[b, c]
                elif not is_title:
                    assert batch.excluded_BC[b, c].item() == (block == blocks[b])
            excluded += int(batch.excluded_BC[b].sum())
    assert excluded > 0, "a block is the hard negative of another query"


def test_blocks_are_withheld_with_null_prob(run: Run, make) -> None:
    for step in range(20):
        batch = make(null_prob=0.0)(step, SIZE)
        assert len(batch.passage_ids_CL) == SIZE and not batch.excluded_BC.any()
        assert batch.target_B.tolist() == list(range(SIZE))
    withheld, batches = 0, make(null_prob=0.5)
    for step in range(40):
        batch = batches(step, SIZE)
        assert texts(run, batch)[-1] == "[SEP]" and len(batch.passage_ids_CL) == SIZE + 1
        withheld_B = batch.target_B == SIZE
        assert torch.equal(batch.target_B[~withheld_B], torch.arange(SIZE)[~withheld_B])
        assert all(row.tolist() == [*withheld_B.tolist(), False] for row in batch.excluded_BC)
        withheld += int(withheld_B.sum())
    assert 0.35 < withheld / 240 < 0.65


def test_held_out_documents_are_no_source_of_queries_but_are_negatives(run: Run) -> None:
    config = replace(run.config, held_out=replace(run.config.held_out, share=0.5))
    half = Run(run.folder, replace(config, ict=IctConfig(question_prob=0.5, negatives=IctNegativesConfig(lexical=2))))
    held_out = set(half.passages.held_out_rows.tolist())
    assert held_out and held_out.isdisjoint(half.passages.training_rows.tolist())
    pairs = ClozePairs.open(half)
    assert held_out.isdisjoint(pairs.rows.tolist()) and held_out.isdisjoint(pairs.sampler.rows.tolist())
    negatives = HardNegatives(half.collator, half.config.ict.negatives, open_lexical(half), half.terms)
    rng = np.random.default_rng(0)
    found = {row for row in pairs.rows.tolist() for row in negatives.draw(pairs.draw(row, rng), rng)}
    assert found & held_out
