"""One question as its file has it, and the checks that every format shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm.corpus.records import BadRecord, Place, check_text, json_type
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
    **more: Any,
) -> QuestionRecord:
    """Validate the parts of a record and build it.

    Raises BadRecord if the question is empty or not a string, the answers are not a list of
    strings, or no answer is left.
    """
    if not isinstance(text, str):
        raise BadRecord("question is not a string", f" but {json_type(text)}")
    if not text.strip():
        raise BadRecord("empty question")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list | tuple):
        raise BadRecord("answers are not a list of strings", f" but {json_type(answers)}")
    if (
        odd := next((answer for answer in answers if not isinstance(answer, str)), None)
    ) is not None or None in answers:
        raise BadRecord("answers are not a list of strings", f": the list contains {json_type(odd)}")
    for part in (str(name), text, *answers):
        check_text(part)
    kept = tuple(dict.fromkeys(answer for answer in answers if answer.strip()))
    if not kept:
        raise BadRecord(UNANSWERABLE)
    return QuestionRecord(place, str(name), text, kept, **more)


def question_number(place: Place) -> str:
    """Id of a question without one: file name and line number."""
    return f"{stem(Path(place.file))[0]}-{place.line}"
