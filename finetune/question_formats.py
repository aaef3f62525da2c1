"""The formats in which people have questions, each a function from a source to records;
`FORMATS` is the registry."""

import ast
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm.corpus.text_files import (
    BadRecord,
    BadRecords,
    Place,
    check_file,
    check_text,
    detect_by_key,
    json_type,
    lines,
    named_format,
    parse_object,
    parse_tsv,
    parsed_lines,
    read_json,
    stem,
)
from realm.errors import UserError
from realm.run.data_config import QuestionSource
from realm.runtime.hub import load_split

UNANSWERABLE = "no answer"
"""Kind under which questions that their authors left without an answer are counted; no mistake
of the file."""


@dataclass(frozen=True)
class QuestionRecord:
    """One question as its file has it."""

    place: Place
    id: str
    text: str
    answers: tuple[str, ...]
    """Accepted answers, or one regular expression of them."""
    is_pattern: bool = False
    """Whether the answer is a regular expression (CuratedTREC)."""
    context: str | None = None
    """Text of the paragraph the question was asked about."""
    starts: tuple[int, ...] = ()
    """Characters of the context at which answers start, where known."""
    passage: str | None = None
    """Id of the document the question was asked about."""
    article: str | None = None
    """The article of SQuAD that the paragraph stands in."""

    @property
    def document(self) -> str | None:
        """What folds must not tear apart."""
        return self.article or self.passage or self.context


def read_questions(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """The questions of one source in its order, those of the folds that it takes; broken ones, and
    those without an answer, are noted in `report`.

    Raises UserError where the source cannot be read at all, its format is not known, or folds are
    asked of questions without documents.
    """
    name = format_of(source)
    for field, formats in (
        ("articles", ("squad",)),
        ("exclude_articles", ("squad",)),
        ("fields", ("jsonl", "datasets")),
    ):
        if getattr(source, field) and name not in formats:
            raise UserError(
                f"`{field}` of {source.path} is for the format {' or '.join(formats)}, and these questions are {name}; leave it out."
            )
    for record in FORMATS[name](source, report):
        if source.use_folds:
            if record.document is None:
                raise UserError(
                    f"{record.place}: folds are of documents, and this question names neither an article, a passage nor a context."
                )
            if zlib.crc32(record.document.encode()) % source.num_folds not in source.use_folds:
                continue
        yield record


def format_of(source: QuestionSource) -> str:
    """The format by name. Raises UserError where it is unknown, or can be told neither from the
    name nor from the first record."""
    if named := named_format(source.format, FORMATS, source.path):
        return named
    path = Path(source.path)
    if path.is_dir():
        return "datasets"
    _, suffix = stem(path)
    if suffix == ".jsonl":
        return "jsonl"
    check_file(path, "questions")
    if suffix == ".json":
        if kind := detect_by_key(path, "questions", {"squad": "data", "timeqa": "paras", "webq": "qText"}):
            return kind
    elif suffix in (".tsv", ".csv", ".txt", ".qas"):
        columns = _columns(path)
        if columns == 2 and "trec" in path.name.lower():
            raise UserError(
                f"{path} has answers or regular expressions, and they look alike; name its format, trec for patterns or qas for answers"
            )
        if columns in (2, 4):
            return {2: "qas", 4: "trec"}[columns]
    raise UserError(
        f"the format of the questions {path} cannot be told from its name or its first record; name it, one of {', '.join(FORMATS)}"
    )


def _columns(path: Path) -> int:
    for _, line in lines(path, lambda *_: None):
        try:
            return len(parse_tsv(line))
        except BadRecord:
            break
    return 0


def _checked(
    place: Place,
    name: object,
    text: object,
    answers: object,
    **more: Any,
) -> QuestionRecord:
    """A record, its parts being what they must be. Raises BadRecord."""
    if not isinstance(text, str) or not text.strip():
        raise BadRecord("no question", f" but {json_type(text) if not isinstance(text, str) else 'blanks'}")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list | tuple):
        raise BadRecord("answers are no list of texts", f" but {json_type(answers)}")
    if (
        odd := next((answer for answer in answers if not isinstance(answer, str)), None)
    ) is not None or None in answers:
        raise BadRecord("answers are no list of texts", f": {json_type(odd)} is among them")
    for part in (text, *answers):
        check_text(part)
    kept = tuple(dict.fromkeys(answer for answer in answers if answer.strip()))
    if not kept:
        raise BadRecord(UNANSWERABLE)
    return QuestionRecord(place, str(name), text, kept, **more)


def _number(place: Place) -> str:
    return f"{stem(Path(place.file))[0]}-{place.line}"


def _read_jsonl(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """NQ-open and its like: `{"question": …, "answer": [ … ]}` a line, other names by `fields`."""

    def parse(place: Place, line: bytes) -> QuestionRecord:
        return _from_fields(place, parse_object(line), source)

    return parsed_lines(Path(source.path), 'one JSON object a line, {"question": …, "answer": [ … ]}', report, parse)


def _from_fields(place: Place, record: dict[str, Any], source: QuestionSource) -> QuestionRecord:
    def get(name: str, *others: str) -> Any:
        names = [source.fields[name]] if name in source.fields else [name, *others]
        for key in names:
            if key in record:
                return record[key]
        raise BadRecord(
            f"no field {' or '.join(names)}", f"; the record has {', '.join(sorted(record)) or 'no fields'}"
        )

    answers = get("answers", "answer")
    if isinstance(answers, dict):  # as the hub's SQuAD and TriviaQA have them
        answers = answers.get("text", answers.get("aliases", answers))
    identity = [source.fields["id"]] if "id" in source.fields else ["id", "question_id"]
    name = next((record[key] for key in identity if record.get(key) is not None), _number(place))
    context = record.get(source.fields.get("context", "context"))
    context = context if isinstance(context, str) else None
    passage = record.get(source.fields.get("passage", "passage"))
    return _checked(
        place, name, get("question"), answers, context=context, passage=None if passage is None else str(passage)
    )


def _read_qas(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """DPR's `.qas` tables: a question, a tab, its answers as a Python or JSON list, with CSV
    quoting where it is needed."""

    def parse(place: Place, line: bytes) -> QuestionRecord:
        columns = parse_tsv(line)
        if len(columns) != 2:
            raise BadRecord("not 2 columns", f" but {len(columns)}")
        return _checked(place, _number(place), columns[0], _literal_list(columns[1]))

    return parsed_lines(Path(source.path), "tab-separated lines of a question and a list of answers", report, parse)


def _literal_list(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord("answers are no list", f" but {text[:60]!r}") from None


def _read_trec(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """CuratedTREC: number, kind, question and a regular expression of its answers, tab-separated
    and never quoted.

    Or, as DPR has it, a question and a list of regular expressions.
    """
    import re

    def parse(place: Place, line: bytes) -> QuestionRecord:
        try:
            columns = line.decode("utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None
        if len(columns) not in (2, 4):
            raise BadRecord("not 4 columns (number, kind, question, pattern)", f" but {len(columns)}")
        question, pattern = columns[-2], columns[-1]
        if len(columns) == 2:
            pattern = _alternatives(pattern)
        try:
            compiled = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise BadRecord("no regular expression", f" ({error}): {pattern[:60]!r}") from None
        if compiled.fullmatch(""):
            raise BadRecord("a regular expression that matches nothing at all", f": {pattern[:60]!r}")
        return _checked(
            place, columns[0] if len(columns) == 4 else _number(place), question, [pattern], is_pattern=True
        )

    return parsed_lines(
        Path(source.path), "tab-separated lines of number, kind, question and regular expression", report, parse
    )


def _alternatives(column: str) -> str:
    """One regular expression for a list of them, quoted as in CSV where it has to be; what is no
    list stays as it is."""
    try:
        patterns = _literal_list(parse_tsv(column.encode())[0])
    except BadRecord:
        return column
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        return column
    return patterns[0] if len(patterns) == 1 else "|".join(f"(?:{pattern})" for pattern in patterns)


def _read_webq(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """WebQuestions: a list of `{"qId", "qText", "answers"}`."""
    path = Path(source.path)
    entries = read_json(path, "WebQuestions' list of questions")
    if not isinstance(entries, list):
        raise UserError(f"{path} is not in WebQuestions' format: it must be a list of objects with qText and answers")
    for number, entry in enumerate(entries):
        place = Place(f"{path}, record {number}")
        try:
            if not isinstance(entry, dict) or "qText" not in entry or "answers" not in entry:
                raise BadRecord("no qText or no answers")
            yield _checked(
                place, number if entry.get("qId") is None else entry["qId"], entry["qText"], entry["answers"]
            )
        except BadRecord as bad:
            report.add(place, bad.kind, bad.detail)


def _read_squad(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """SQuAD 1.1 and 2.0; questions marked impossible are counted as unanswerable. A paragraph
    may name its document under `passage`."""
    path = Path(source.path)
    squad = read_json(path, "SQuAD's articles")
    if not isinstance(squad, dict) or not isinstance(squad.get("data"), list):
        raise UserError(f'question file {path} is not in SQuAD format: it must be an object with a list under "data"')
    titles = [_plain(str(article.get("title") or "")) if isinstance(article, dict) else "" for article in squad["data"]]
    wanted, excluded = {_plain(name) for name in source.articles}, {_plain(name) for name in source.exclude_articles}
    if missing := sorted((wanted | excluded) - set(titles)):
        raise UserError(f"question file {path} has no article {missing[0]!r}; check `articles` and `exclude_articles`")
    for a, (title, article) in enumerate(zip(titles, squad["data"], strict=True)):
        if (wanted and title not in wanted) or title in excluded:
            continue
        place = Place(f"{path}, data[{a}]")
        try:
            for p, paragraph in enumerate(article["paragraphs"]):
                place = Place(f"{path}, data[{a}].paragraphs[{p}]")
                context, passage, entries = paragraph.get("context"), paragraph.get("passage"), paragraph["qas"]
                for q, entry in enumerate(entries):
                    place = Place(f"{path}, data[{a}].paragraphs[{p}].qas[{q}]")
                    try:
                        yield _squad_question(place, entry, context, passage, title)
                    except BadRecord as bad:
                        report.add(place, bad.kind, bad.detail)
        except (KeyError, TypeError, AttributeError) as error:
            report.add(place, "not as SQuAD has it", f" ({error!r})")


def _squad_question(
    place: Place, entry: dict[str, Any], context: str | None, passage: str | None, article: str
) -> QuestionRecord:
    try:
        answers = [] if entry.get("is_impossible") else entry["answers"]
        texts = [answer["text"] for answer in answers]
        starts = tuple(answer["answer_start"] for answer in answers if isinstance(answer.get("answer_start"), int))
        return _checked(
            place,
            entry["id"],
            entry["question"],
            texts,
            context=context,
            passage=passage,
            starts=starts,
            article=article,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRecord("not as SQuAD has it", f" ({error!r})") from None


def _plain(title: str) -> str:
    return title.replace("_", " ")


def _read_timeqa(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """TimeQA: a list of articles with `questions`, each `[question, [{"para", "from", "end",
    "answer"}, …]]`; the article's link is its id."""
    path = Path(source.path)
    articles = read_json(path, "TimeQA's list of articles")
    for a, article in enumerate(articles if isinstance(articles, list) else [articles]):
        place = Place(f"{path}, record {a}")
        try:
            link, paragraphs, questions = article["link"], article["paras"], article["questions"]
            offsets = [sum(len(part) + 2 for part in paragraphs[:number]) for number in range(len(paragraphs))]
            for q, (text, answers) in enumerate(questions):
                place = Place(f"{path}, record {a}, question {q}")
                try:
                    starts = tuple(offsets[answer["para"]] + answer["from"] for answer in answers)
                    yield _checked(
                        place,
                        f"{article['index']}/{q}",
                        text,
                        [answer["answer"] for answer in answers],
                        passage=link,
                        starts=starts,
                    )
                except BadRecord as bad:
                    report.add(place, bad.kind, bad.detail)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            report.add(place, "not as TimeQA has it", f" ({error!r})")


def _read_datasets(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """A data set of the Hugging Face library: a folder made by `save_to_disk`, or a name on the
    hub."""
    for number, record in enumerate(load_split(source.path, source.name, source.split)):
        place = Place(source.path, number + 1)
        try:
            yield _from_fields(place, record, source)
        except BadRecord as bad:
            report.add(place, bad.kind, bad.detail)


FORMATS: dict[str, Callable[[QuestionSource, BadRecords], Iterator[QuestionRecord]]] = {
    "squad": _read_squad,
    "jsonl": _read_jsonl,
    "qas": _read_qas,
    "webq": _read_webq,
    "trec": _read_trec,
    "timeqa": _read_timeqa,
    "datasets": _read_datasets,
}
"""Reader of each format by the name used in configs."""
