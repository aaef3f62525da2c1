"""Questions: read from their source, tokenized, and paired with their passage if it is known."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from finetune.patterns import AnswerPattern
from finetune.question_formats import format_of, read_questions
from finetune.question_record import UNANSWERABLE, QuestionRecord
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.records import BadRecords
from realm.errors import UserError
from realm.run.data_config import QuestionSource
from realm.run.folder import Run
from realm.runtime.telemetry import console
from realm.text.blocks import text_hash
from realm.text.inputs import IntArray
from realm.text.tokenizer import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_QUESTIONS, MAX_QUESTIONS = 32, 512
"""Minimum and maximum number of questions to time steps with."""
SAMPLE_TOKENS = 16
"""Wordpieces of a sample question; typical of Natural Questions and SQuAD."""


@dataclass(frozen=True)
class Question:
    """One question with its accepted answers."""

    id: str
    text: str
    answers: tuple[str, ...]
    ids: IntArray = field(repr=False)
    """Wordpieces of the question."""
    answer_ids: tuple[IntArray, ...] = field(default=(), repr=False)
    """Wordpieces of each answer; empty for a pattern."""
    passage: int | None = None
    """Row of the passage that contains the answer, in the document that the question was asked
    about; None if unknown."""
    document: int | None = None
    """Number of that document in the corpus; None if unknown."""
    is_pattern: bool = False
    """Whether the answer is a regular expression, as in CuratedTREC."""

    @cached_property
    def pattern(self) -> AnswerPattern:
        """The regular expression; only if `is_pattern`."""
        return AnswerPattern(self.answers[0])


def load_questions(
    source: QuestionSource,
    passages: PreparedCorpus,
    tokenizer: "PreTrainedTokenizerBase",
    max_query_tokens: int,
    quiet: bool = False,
) -> list[Question]:
    """Read the questions of a source (see `question_formats`) and find their passages.

    A passage is found by its id or by the text of the paragraph. Unless `quiet`, prints the number
    of questions, their format, and how many were skipped or are longer than `max_query_tokens`.
    Raises UserError if no question is usable, for an unknown passage, and (unless `skip_bad`) for
    invalid records, with file and line of each.
    """
    report = BadRecords(expected_kinds=(UNANSWERABLE,))
    read = list(islice(read_questions(source, report), source.limit))
    encoded = [ids for ids, _ in tokenize(tokenizer, [record.text for record in read])]
    for record, ids in zip(read, encoded, strict=True):
        if not len(ids):
            report.add(record.place, "question without wordpieces", ": the tokenizer drops all its characters")
    records = [record for record, ids in zip(read, encoded, strict=True) if len(ids)]
    question_ids = [ids for ids in encoded if len(ids)]
    if report.total and not source.skip_bad:
        raise UserError(f"{report}\nFix them, or skip them with skip_bad: true next to the path of these questions.")
    if not records:
        raise UserError(
            f"question file {source.path} contains no usable questions." + (f"\n{report}" if report.total else "")
        )
    answer_ids = [
        () if record.is_pattern else tuple(ids for ids, _ in tokenize(tokenizer, list(record.answers)))
        for record in records
    ]
    finder = _PassageFinder(passages)
    questions = []
    for record, ids, answers in zip(records, question_ids, answer_ids, strict=True):
        row = finder.find(record)
        document = None if row is None else passages.document(row)
        questions.append(
            Question(record.id, record.text, record.answers, ids, answers, row, document, record.is_pattern)
        )
    if not quiet:
        known = sum(question.passage is not None for question in questions)
        how = f"{format_of(source)}{', auto-detected' if source.format == 'auto' else ''}"
        skipped = ", ".join(f"{number:,} x {kind}" for kind, number in (report.expected + report.counts).items())
        truncated = sum(is_truncated(ids, max_query_tokens) for ids in question_ids)
        console.print(
            f"  {len(questions):,} questions in {source.path} ({how}), {known:,} with a passage in the corpus"
            + (f"; skipped: {skipped}" if skipped else "")
            + (f"; {truncated:,} truncated to retriever.max_query_tokens ({max_query_tokens})" if truncated else "")
        )
    return questions


def is_truncated(question_ids: IntArray, max_query_tokens: int) -> bool:
    """Whether the models read only the first wordpieces of a question (`Wordpieces.query`)."""
    return len(question_ids) > max_query_tokens - 2


def training_source(run: Run) -> QuestionSource:
    """The source of the questions to finetune on. Raises UserError if `data.train` is not set."""
    source = run.questions("train")
    if source is None:
        raise UserError("data.train is not set; set it in the config, or pass --questions FILE.")
    return source


def timing_questions(run: Run) -> list[Question]:
    """Questions to time steps with: training questions with a known passage, or artificial ones."""
    source = run.questions("train")
    if source is not None:
        questions = load_questions(
            source, run.passages, run.tokenizer, run.config.retriever.max_query_tokens, quiet=True
        )
        known = [question for question in questions if question.passage is not None]
        if len(known) >= MIN_QUESTIONS:
            return known[:: max(1, len(known) // MAX_QUESTIONS)]
    return sample_questions(run.passages, run.config.seed)


def sample_questions(passages: PreparedCorpus, seed: int, count: int = MAX_QUESTIONS) -> list[Question]:
    """Artificial questions for timing: the first wordpieces of random passages.

    The answer of each is the first salient span of its passage, if it has one.
    """
    rng = np.random.default_rng(seed)
    questions = []
    for row in rng.choice(passages.rows, min(count, len(passages.rows)), replace=False).tolist():
        ids, (starts, ends, _) = passages.text_ids(row), passages.spans(row)
        answer_ids = (np.array(ids[starts[0] : ends[0]]),) if len(starts) else ()
        answers = ("",) * len(answer_ids)
        questions.append(
            Question(str(row), "", answers, np.array(ids[:SAMPLE_TOKENS]), answer_ids, row, passages.document(row))
        )
    return questions


class _PassageFinder:
    """Finds the passage that a question was asked about."""

    def __init__(self, corpus: PreparedCorpus) -> None:
        self.corpus = corpus

    @cached_property
    def _row_of_text(self) -> dict[int, int]:
        """Row of the first block of each document, by the hash of the document's text."""
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
        """Row of the first block of the record's document that contains an answer.

        If none does, it is the document's first block. Returns None if the record names no
        document, or its text is not in the corpus. Raises UserError if its document id is not in
        the corpus.
        """
        first: int | None = None
        if record.passage is not None:
            first = self._row_of_id(record)
        elif record.context is not None:
            first = self._row_of_text.get(text_hash(record.context))
        return None if first is None else self._block_with_answer(first, record)

    def _row_of_id(self, record: QuestionRecord) -> int:
        for name in (f"{record.passage}", f"{record.passage}#0"):
            try:
                return self.corpus.row_of_id(name)
            except KeyError:
                continue
        raise UserError(
            f"{record.place}: document {record.passage!r} is not in the corpus; "
            "remove the question, or use the corpus that contains it."
        )

    def _block_with_answer(self, first: int, record: QuestionRecord) -> int:
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
