"""Checks, before the first step of a run, of everything that it will read."""

from finetune.question_formats import read_questions
from pretrain.masked_span_eval import annotated_items
from realm.corpus.records import BadRecords
from realm.errors import UserError
from realm.run.folder import Run
from realm.run.initial import check_init_from

_QUESTIONS = ("train", "validation", "test")
_STATEMENTS = ("masked_spans", "closed_book", "unsupported")


def check_inputs(run: Run) -> None:
    """Check that the files that the config names exist and can be read.

    Only the first usable question of a source is read; annotated statements are read completely.
    Raises UserError naming the field, the file and the line.
    """
    check_init_from(run)
    for field in _QUESTIONS:
        _check_questions(run, field)
    for field in _STATEMENTS:
        if run.data(field) is not None and not annotated_items(run, field):
            raise UserError(f"data.{field}: {run.data(field)} contains no annotated statements that can be masked.")


def _check_questions(run: Run, field: str) -> None:
    """Read the first question of a source."""
    source = run.questions(field)
    if source is None:
        return
    report = BadRecords()
    first = next(read_questions(source, report), None)
    if first is None:
        found = f"\n{report}" if report.total else ""
        raise UserError(f"data.{field}: {source.path} contains no usable questions.{found}")
