"""`realm ask` when the search finds fewer passages than were asked for."""

from types import SimpleNamespace

import numpy as np
import pytest

from finetune.answer import NO_ANSWER, Answer
from finetune.ask import print_answer
from realm.run.folder import Run
from tests.tiny import prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("ask"))


@pytest.mark.parametrize(
    ("rows", "answer", "shown"),
    [
        ([2, 5, -1, -1], Answer("Calvia", 2, 0, 0.7), ["»Calvia«", "also read: Fenwick"]),
        ([2, -1, -1, -1], Answer("Calvia", 2, 0, 0.7), ["»Calvia«"]),
        ([-1, -1, -1, -1], NO_ANSWER, ["no passage was found"]),
    ],
)
def test_slots_without_a_passage_are_not_shown(
    run: Run, rows: list[int], answer: Answer, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = SimpleNamespace(run=run, index=range(12), retrieve=lambda *_: np.array([rows]), read=lambda *_: [answer])
    print_answer(answerer, "Which town is it?", 4)  # type: ignore[arg-type]
    output = capsys.readouterr().out
    assert all(part in output for part in shown)
    assert ("also read" in output) == (len(shown) == 2)
