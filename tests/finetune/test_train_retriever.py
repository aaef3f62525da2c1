"""Batches of retriever finetuning: passages, hard negatives, and excluded passages."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.collate import QuestionCollator
from finetune.questions import Question, load_questions
from finetune.train_retriever import RetrieverBatches, RetrieverFinetuning
from index.frozen import frozen_index
from realm.errors import UserError
from realm.models.retriever_files import load_retriever
from realm.run.data_config import QuestionSource
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever
from tests.tiny import prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(
        tmp_path_factory.mktemp("towns"),
        finetune_retriever={"steps": 4, "batch_size": 4, "retrieve": 6, "negatives": 2},
    )


@pytest.fixture(scope="module")
def make(run: Run) -> Callable[..., RetrieverBatches]:
    retriever = build_initial_retriever(run)
    index = frozen_index(run.folder, retriever, run.passages, run.config.refresh, lambda line: None)

    def batches(questions: list[Question], **changes: object) -> RetrieverBatches:
        config = replace(run.config.finetune_retriever, **changes)
        collator = QuestionCollator(run.collator, run.tokenizer, index, run.config.reader.max_span_tokens)
        return RetrieverBatches(collator, load_retriever(retriever)[0], questions, config, run.config.seed)

    return batches


@pytest.fixture(scope="module")
def questions(run: Run) -> list[Question]:
    source = run.questions("train")
    assert source is not None
    return load_questions(source, run.passages, run.tokenizer, 32, quiet=True)


def rows_of(run: Run, batch) -> list[int]:
    """The corpus row of each passage of a batch, found by its wordpieces."""
    words = run.wordpieces
    texts = {
        (
            words.cls,
            *run.passages.title_ids(row).tolist(),
            words.sep,
            *run.passages.text_ids(row).tolist(),
            words.sep,
        ): row
        for row in range(len(run.passages))
    }
    return [
        texts[tuple(ids[mask.bool()].tolist())]
        for ids, mask in zip(batch.passage_ids_CL, batch.passage_mask_CL, strict=True)
    ]


def test_every_question_has_its_passage_and_negatives(run, make, questions):
    by_ids = {tuple(question.ids.tolist()): question for question in questions}
    seen = set()
    for step in range(6):
        batch = make(questions)(step, 4)
        rows = rows_of(run, batch)
        asked = [
            by_ids[tuple(ids[mask.bool()].tolist()[1:-1])]
            for ids, mask in zip(batch.query_ids_BL, batch.query_mask_BL, strict=True)
        ]
        assert batch.target_B.tolist() == [0, 1, 2, 3] and len(rows) == 12
        for b, question in enumerate(asked):
            assert rows[b] == question.passage
            negatives = rows[4 + 2 * b : 6 + 2 * b]
            assert question.passage not in negatives and len(set(negatives)) == 2
            wanted = [c != b and rows[c] == question.passage for c in range(12)]
            assert batch.excluded_BC[b].tolist() == wanted, "other copies of the question's passage are excluded"
            seen.add(question.id)
    assert len(seen) == 12, "six batches of four are two epochs of twelve"


def test_hard_negatives_are_retrieved_and_depend_only_on_the_step(run, make, questions):
    batches = make(questions)
    first, again = batches(2, 4), make(questions)(2, 4)
    assert first.passage_ids_CL.equal(again.passage_ids_CL) and first.query_ids_BL.equal(again.query_ids_BL)
    assert not first.passage_ids_CL.equal(make(questions)(3, 4).passage_ids_CL)
    found = {int(row) for row in batches.retrieved.ravel()}
    assert set(rows_of(run, first)[4:]) <= found and batches.retrieved.shape == (12, 6)


def test_passages_with_an_answer_are_negatives_only_for_document_positives(run, make, questions):
    # "a town" appears in every passage, so there are no negatives.
    words = run.tokenizer("a town", add_special_tokens=False)["input_ids"]
    everywhere = [
        replace(question, answers=("a town",), answer_ids=(np.array(words, np.int32),)) for question in questions
    ]
    batch = make(everywhere)(0, 4)
    assert len(batch.passage_ids_CL) == 12, "the same on all ranks"
    assert (batch.excluded_BC.sum(1) == 11).all()
    batch = make(everywhere, positives="document")(0, 4)
    assert len(batch.passage_ids_CL) == 12 and not batch.excluded_BC.all(1).any()
    assert (batch.excluded_BC.sum(1) < 11).all()


def test_a_question_without_a_passage_gets_one_with_an_answer_or_is_skipped(run, make, questions, capsys):
    unpaired = [replace(question, passage=None, document=None) for question in questions]
    batches = make(unpaired, retrieve=12)
    assert [question.passage for question in batches.questions] == [question.passage for question in questions]
    few = make(
        [unpaired[0], replace(unpaired[1], answers=("Atlantis",), answer_ids=(np.array([5, 6, 7, 8], np.int32),))],
        retrieve=12,
    )
    assert [question.id for question in few.questions] == [unpaired[0].id] and len(few.retrieved) == 1
    assert "1 questions skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"finetune_retriever\.retrieve"):
        make([replace(unpaired[1], answers=("Atlantis",))])


def test_mistakes_are_reported_before_training(run):
    for changes, message in (
        ({"finetune_retriever": replace(run.config.finetune_retriever, steps=0)}, "finetune_retriever.steps is 0"),
        ({"data": replace(run.config.data, train=None)}, "data.train"),
        ({"data": replace(run.config.data, train=QuestionSource(str(Path("nowhere.json"))))}, "realm ict"),
    ):
        with pytest.raises(UserError, match=message):
            RetrieverFinetuning.open(Run(run.folder, replace(run.config, **changes)))
