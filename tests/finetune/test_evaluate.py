"""Evaluation: what is refused before any question is answered."""

from pathlib import Path

import pytest

from finetune.evaluate import evaluate
from realm.errors import UserError
from realm.run.folder import Run
from tests.tiny import prepared_run


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
