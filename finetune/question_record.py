"""One question as its file has it, and the checks that every format shares."""

from dataclasses import dataclass
from pathlib import Path

from realm.corpus.records import BadRecord, Place, check_text, expect, json_type
from realm.corpus.text_files import stem

UNANSWERABLE = "no answer"
"""Kind of questions that are published without an answer: counted, but not an error."""


@dataclass(frozen=True)
class QuestionRecord:
    """One question as read from its file."""

    place: Place
    id: str
    text: str
    answers: tuple[str, ...]
    """Accepted answers, or one regular expression that describes them."""
    is_pattern: bool = False
    """Whether the answer is a regular expression (CuratedTREC)."""
    context: str | None = None
    """Text of the paragraph that the question was asked about."""
    starts: tuple[int, ...] = ()
    """Character offsets of the answers in the context, if known."""
    passage: str | None = None
    """Id of the document that the question was asked about."""
    article: str | None = None
    """Title of the SQuAD article that contains the paragraph."""

    @property
    def document(self) -> str | None:
        """Key of the document; all its questions are in the same fold."""
        return self.article or self.passage or self.context


def checked_question(
    place: Place,
    name: object,
    text: object,
    answers: object,
    *,
    context: object = None,
    passage: object = None,
    starts: tuple[int, ...] = (),
    article: str | None = None,
    is_pattern: bool = False,
) -> QuestionRecord:
    """Validate the parts of a record and build it.

    Raises BadRecord if the question is empty or not a string, the answers are not a list of
    strings, no answer is left, `name`, `context` or `passage` has another type than in the record,
    or a part cannot be encoded.
    """
    text = expect(text, str, "question")
    if not text.strip():
        raise BadRecord("empty question")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list | tuple):
        raise BadRecord("answers are not a list of strings", f" but {json_type(answers)}")
    for answer in answers:
        if not isinstance(answer, str):
            raise BadRecord("answers are not a list of strings", f": the list contains {json_type(answer)}")
    name, context = _as_id(name, "id"), None if context is None else expect(context, str, "context")
    passage = None if passage is None else _as_id(passage, "passage")
    for part in (name, text, context, passage, article, *answers):
        if part is not None:
            check_text(part)
    kept = tuple(dict.fromkeys(answer for answer in answers if answer.strip()))
    if not kept:
        raise BadRecord(UNANSWERABLE)
    return QuestionRecord(place, name, text, kept, is_pattern, context, starts, passage, article)


def _as_id(value: object, what: str) -> str:
    """A string or number as a string. Raises BadRecord for other types."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord(f"{what} is not a string or number", f" but {json_type(value)}")
    return str(value)


def question_number(place: Place) -> str:
    """Id of a question without one: file name and line number."""
    return f"{stem(Path(place.file))[0]}-{place.line}"
