"""Reader targets of questions: which spans of title and text are answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.collate import QuestionCollator, Substitute
from finetune.questions import Question
from realm.run.folder import Run
from realm.text.tokenizer import tokenize
from tests.tiny import RIVERS, TOWNS, NoIndex, prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(Path(tmp_path_factory.mktemp("towns")))


def encoded(run: Run, text: str) -> np.ndarray:
    return tokenize(run.tokenizer, [text])[0][0]


def asked(run: Run, answer: str) -> Question:
    return Question("q", "Which town?", (answer,), encoded(run, "Which town?"), (encoded(run, answer),))


def answers(run: Run, question: Question, change: Substitute | None = None) -> list[tuple[int, str]]:
    """Segment (0: title, 1: text) and text of every target span in the first passage."""
    collator = QuestionCollator(run.collator, run.tokenizer, NoIndex(), run.config.reader.max_span_tokens)
    rows = np.array([[0]])
    batch = collator.batch([question], collator.queries([question]), rows, rows, [change])
    ids = batch.ids_QL[0]
    second_sep = int((ids == run.wordpieces.sep).nonzero()[1])
    found = (batch.is_answer_QLW[0] & batch.allowed_QLW[0]).nonzero().tolist()
    return [(int(start > second_sep), run.tokenizer.decode(ids[start : start + width + 1])) for start, width in found]


def test_answers_in_title_and_text_are_targets(run):
    town, river = TOWNS[0].lower(), RIVERS[0].lower()
    assert answers(run, asked(run, TOWNS[0])) == [(0, town), (1, town), (1, town)]
    assert answers(run, asked(run, RIVERS[0])) == [(1, river)]


def test_matches_of_a_pattern_in_title_and_text_are_targets(run):
    pattern = replace(asked(run, "Ald[ao]|Is..r"), answer_ids=(), is_pattern=True)
    assert answers(run, pattern) == [(0, "alda"), (1, "alda"), (1, "ister"), (1, "alda")]


def test_a_substitute_replaces_the_answer_in_title_and_text(run):
    change = encoded(run, TOWNS[0]), encoded(run, "Quill Moor")
    assert answers(run, asked(run, TOWNS[0]), change) == [(0, "quill moor"), (1, "quill moor"), (1, "quill moor")]
