"""Checks, before the first step of a run, of everything that it will read."""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.question_formats import read_questions
from finetune.train_reader import check_retrieve
from pretrain.masked_span_eval import annotated_items
from pretrain.realm import check_candidates
from realm.corpus.records import BadRecords
from realm.errors import UserError
from realm.models.bert import bert_config
from realm.run.folder import Run
from realm.run.initial import check_init_from

_QUESTIONS = ("train", "validation", "test")
_STATEMENTS = ("masked_spans", "closed_book", "unsupported")


def check_inputs(run: Run) -> None:
    """Check that the files and models that the config names exist and can be read, and that the
    corpus has enough passages.

    Only the first usable question of a source is read; annotated statements are read completely.
    Raises UserError naming the field, the file and the line.
    """
    check_init_from(run)
    config = run.config
    for section, source in (("retriever", config.retriever.bert), ("reader", config.reader.bert)):
        if source.path is not None:
            bert_config(source.path, f"{section}.bert")
    if config.pretrain.steps:
        check_candidates(run)
    if config.finetune.steps:
        check_retrieve(run)
    for field in _QUESTIONS:
        with _of_field(field):
            _check_questions(run, field)
    for field in _STATEMENTS:
        with _of_field(field):
            if run.data(field) is not None and not annotated_items(run, field):
                raise UserError(f"{run.data(field)} contains no annotated statements that can be masked.")


@contextmanager
def _of_field(field: str) -> Iterator[None]:
    """Name the field of `data` in error messages."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.{field}: {error}") from error


def _check_questions(run: Run, field: str) -> None:
    """Read the first question of a source."""
    source = run.questions(field)
    if source is None:
        return
    report = BadRecords()
    first = next(read_questions(source, report), None)
    if first is None:
        found = f"\n{report}" if report.total else ""
        raise UserError(f"{source.path} contains no usable questions.{found}")
