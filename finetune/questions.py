"""Questions of a run: read from their file, tokenised, and tied to the passage they were asked
about where that is known."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from finetune.question_formats import UNANSWERABLE, QuestionRecord, format_of, read_questions
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.text_files import BadRecords
from realm.errors import UserError
from realm.run.config import QuestionSource
from realm.run.folder import Run
from realm.runtime.telemetry import console
from realm.text.blocks import text_hash
from realm.text.inputs import IntArray
from realm.text.tokenizer import tokenize


@dataclass(frozen=True)
class Question:
    """One question with its accepted answers."""

    id: str
    text: str
    answers: tuple[str, ...]
    ids: IntArray = field(repr=False)
    """Wordpieces of the question."""
    answer_ids: tuple[IntArray, ...] = field(default=(), repr=False)
    """Wordpieces of each answer; none of a pattern."""
    passage: int | None = None
    """Row of the passage that holds the answer in the document the question was asked about,
    where known."""
    document: int | None = None
    """Number of that document in the corpus."""
    is_pattern: bool = False
    """Whether the answer is a regular expression, as in CuratedTREC."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The compiled regular expression of a question with `is_pattern`."""
        return re.compile(self.answers[0], re.IGNORECASE)


def load_questions(source: QuestionSource, run: Run, quiet: bool = False) -> list[Question]:
    """Questions of a source (see `question_formats`), tied to the run's passages by id or by the
    text of their paragraph.

    Says how many there are, of which format, and how many were left out. Raises UserError naming
    the place of every broken record, of a passage that the corpus does not hold, and for a source
    without a question that can be used.
    """
    report, records = BadRecords(no_mistakes=(UNANSWERABLE,)), []
    for record in read_questions(source, report):
        records.append(record)
        if len(records) == source.limit:
            break
    if report.total and not source.skip_bad:
        raise UserError(
            f"{report}\nMend them, or leave them out with skip_bad: true beside the path of these questions."
        )
    if not records:
        raise UserError(
            f"question file {source.path} holds no question that can be used." + (f"\n{report}" if report.total else "")
        )
    question_ids = [ids for ids, _ in tokenize(run.tokenizer, [record.text for record in records])]
    answer_ids = [
        () if record.is_pattern else tuple(ids for ids, _ in tokenize(run.tokenizer, list(record.answers)))
        for record in records
    ]
    passages = _Passages(run.passages)
    questions = []
    for record, ids, answers in zip(records, question_ids, answer_ids, strict=True):
        row = passages.find(record)
        document = None if row is None else run.passages.document(row)
        questions.append(
            Question(record.id, record.text, record.answers, ids, answers, row, document, record.is_pattern)
        )
    if not quiet:
        known = sum(question.passage is not None for question in questions)
        how = f"{format_of(source)}{', by its content' if source.format == 'auto' else ''}"
        left_out = ", ".join(f"{number:,} x {kind}" for kind, number in (report.left_out + report.counts).items())
        console.print(
            f"  {len(questions):,} questions of {source.path} ({how}), {known:,} with a passage of the corpus"
            + (f"; left out: {left_out}" if left_out else "")
        )
    return questions


class _Passages:
    """Finds the passage that a question was asked about."""

    def __init__(self, corpus: PreparedCorpus) -> None:
        self.corpus = corpus

    @cached_property
    def _row_of_text(self) -> dict[int, int]:
        """First block of each document by the hash of the document's text."""
        rows: dict[int, int] = {}
        first_rows = np.flatnonzero(self.corpus.places == 0)
        for first, end in zip(first_rows.tolist(), [*first_rows[1:].tolist(), len(self.corpus)], strict=True):
            whole = (
                self.corpus.text_hash(first)
                if end == first + 1
                else text_hash("".join(map(self.corpus.text, range(first, end))))
            )
            if first not in self.corpus.deleted:
                rows.setdefault(whole, first)
        return rows

    def find(self, record: QuestionRecord) -> int | None:
        """Row of the block that holds the first answer, in the record's document; None where the
        record names none, or only by a text that the corpus has not. Raises UserError for an id
        that the corpus has not."""
        first: int | None = None
        if record.passage is not None:
            first = self._row_of_id(record)
        elif record.context is not None:
            first = self._row_of_text.get(text_hash(record.context))
        return None if first is None else self._holding(first, record)

    def _row_of_id(self, record: QuestionRecord) -> int:
        for name in (f"{record.passage}", f"{record.passage}#0"):
            try:
                return self.corpus.row_of_id(name)
            except KeyError:
                continue
        raise UserError(
            f"{record.place}: the corpus has no document {record.passage!r} (any more); leave the question out, or use its corpus."
        )

    def _holding(self, first: int, record: QuestionRecord) -> int:
        document, row, passed = self.corpus.document(first), first, 0
        start = min(record.starts, default=None) if record.starts else None
        while row < len(self.corpus) and self.corpus.document(row) == document:
            text = self.corpus.text(row)
            if start is None:
                if any(answer.casefold() in text.casefold() for answer in record.answers):
                    return row
            elif start < passed + len(text):
                return row
            passed, row = passed + len(text), row + 1
        return first
