"""Evaluation: what is refused before any question is answered."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

import finetune.evaluate as module
from finetune.evaluate import evaluate
from realm.errors import UserError
from realm.run.folder import Run
from tests.tiny import TOWNS, prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("towns"))


@pytest.mark.parametrize("name", ["a/b", "../../x", "", ".hidden", "x" * 300, "a\nb", "\ud800"])
def test_a_name_that_is_not_part_of_a_file_name_is_refused(run: Run, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        evaluate(run, name=name)
    assert not (run.folder / "evaluations").exists()


def test_an_unknown_retriever_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="'bm42' is not a retriever"):
        evaluate(run, compare=["bm42"])


def test_a_question_id_that_is_not_unicode_is_a_bad_record(run: Run, tmp_path: Path) -> None:
    from finetune.questions import load_questions
    from realm.run.data_config import QuestionSource

    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "\\ud800", "question": "who", "answer": ["x"]}\n')
    with pytest.raises(UserError, match=r"q\.jsonl:1: unpaired surrogate"):
        load_questions(QuestionSource(str(path)), run.passages, run.tokenizer, 32)


def test_predictions_are_complete_or_absent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while they are written leaves the predictions of an earlier evaluation."""
    folder = run.folder / "evaluations"
    records = [{"id": "q", "question": "who", "em": True, "f1": 1.0, "rank_of_answer": 1, "rank_of_substring": 1}]
    monkeypatch.setattr(module, "Answerer", lambda run, stage: None)
    monkeypatch.setattr(module, "answerable", lambda *arguments: np.ones(len(TOWNS), dtype=bool))
    monkeypatch.setattr(module, "answer_all", lambda *arguments, **options: records)
    evaluate(run)
    predictions = folder / "test.finetune.predictions.jsonl"
    before = predictions.read_bytes()
    assert [json.loads(line) for line in before.splitlines()] == records

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records.append({**records[0], "id": "another"})
    monkeypatch.setattr("realm.runtime.publish.os.fsync", full_disk)
    for name in ("test", "new"):
        with pytest.raises(OSError, match="No space left"):
            evaluate(run, name=name)
    assert predictions.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["test.finetune.predictions.jsonl", "test.json"]
