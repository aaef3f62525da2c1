"""Question formats: one function per format yields the records of a source; see `FORMATS`."""

import ast
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.question_record import QuestionRecord, checked_question, question_number
from realm.corpus.records import BadRecord, BadRecords, Place
from realm.corpus.text_files import (
    check_file,
    detect_by_key,
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


def read_questions(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """Yield the questions of one source in order, restricted to its `use_folds`.

    Invalid records and questions without an answer are added to `report`. Raises UserError if the
    source cannot be read, its format is unknown, an option does not apply to the format, or folds
    are requested for questions without documents.
    """
    name = format_of(source)
    for field, formats in (
        ("articles", ("squad",)),
        ("exclude_articles", ("squad",)),
        ("fields", ("jsonl", "datasets")),
    ):
        if getattr(source, field) and name not in formats:
            raise UserError(
                f"`{field}` of {source.path} is only for the format {' or '.join(formats)}, but the format is {name}; "
                "remove it."
            )
    for record in FORMATS[name](source, report):
        if source.use_folds:
            if record.document is None:
                raise UserError(
                    f"{record.place}: `use_folds` splits questions by document, but this one has no article, passage "
                    "or context; remove `use_folds`."
                )
            if zlib.crc32(record.document.encode()) % source.num_folds not in source.use_folds:
                continue
        yield record


def format_of(source: QuestionSource) -> str:
    """Name of the source's format, auto-detected from file name and content if it is `auto`.

    Raises UserError if the format is unknown or cannot be detected.
    """
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
                f"{path} may contain answers or regular expressions; set `format` to trec for regular "
                "expressions or to qas for answers."
            )
        if columns in (2, 4):
            return {2: "qas", 4: "trec"}[columns]
    raise UserError(
        f"the format of the questions {path} cannot be auto-detected; set `format` to one of {', '.join(FORMATS)}."
    )


def _columns(path: Path) -> int:
    """Number of tab-separated columns of the first line; 0 if it cannot be parsed."""
    for _, line in lines(path, lambda *_: None):
        try:
            return len(parse_tsv(line))
        except BadRecord:
            break
    return 0


def _read_jsonl(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """NQ-open and similar: `{"question": …, "answer": […]}` per line; `fields` maps other names."""

    def parse(place: Place, line: bytes) -> QuestionRecord:
        return _from_fields(place, parse_object(line), source)

    return parsed_lines(Path(source.path), 'one JSON object per line, {"question": …, "answer": [ … ]}', report, parse)


def _from_fields(place: Place, record: dict[str, Any], source: QuestionSource) -> QuestionRecord:
    def get(name: str, *others: str) -> Any:
        names = [source.fields[name]] if name in source.fields else [name, *others]
        for key in names:
            if key in record:
                return record[key]
        raise BadRecord(
            f"missing field {' or '.join(names)}", f"; the record has {', '.join(sorted(record)) or 'no fields'}"
        )

    answers = get("answers", "answer")
    if isinstance(answers, dict):  # as in SQuAD and TriviaQA on the hub
        answers = answers.get("text", answers.get("aliases", answers))
    identity = [source.fields["id"]] if "id" in source.fields else ["id", "question_id"]
    name = next((record[key] for key in identity if record.get(key) is not None), question_number(place))
    context = record.get(source.fields.get("context", "context"))
    context = context if isinstance(context, str) else None
    passage = record.get(source.fields.get("passage", "passage"))
    return checked_question(
        place, name, get("question"), answers, context=context, passage=None if passage is None else str(passage)
    )


def _read_qas(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """DPR's `.qas` tables: a question, a tab, and its answers as a Python or JSON list.

    Columns are quoted as in CSV if necessary.
    """

    def parse(place: Place, line: bytes) -> QuestionRecord:
        columns = parse_tsv(line)
        if len(columns) != 2:
            raise BadRecord("expected 2 columns", f", got {len(columns)}")
        return checked_question(place, question_number(place), columns[0], _literal_list(columns[1]))

    return parsed_lines(Path(source.path), "tab-separated lines of a question and a list of answers", report, parse)


def _literal_list(text: str) -> object:
    """Parse a Python or JSON literal. Raises BadRecord if it is neither."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord("answers are not a list", f" but {text[:60]!r}") from None


def _read_trec(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """CuratedTREC: tab-separated number, kind, question and regular expression, without quoting.

    DPR's variant with a question and a list of regular expressions is also accepted.
    """
    import re

    def parse(place: Place, line: bytes) -> QuestionRecord:
        try:
            columns = line.decode("utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None
        if len(columns) not in (2, 4):
            raise BadRecord("expected 4 columns (number, kind, question, pattern)", f", got {len(columns)}")
        question, pattern = columns[-2], columns[-1]
        if len(columns) == 2:
            pattern = _alternatives(pattern)
        try:
            compiled = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise BadRecord("invalid regular expression", f" ({error}): {pattern[:60]!r}") from None
        if compiled.fullmatch(""):
            raise BadRecord("regular expression matches the empty string", f": {pattern[:60]!r}")
        return checked_question(
            place, columns[0] if len(columns) == 4 else question_number(place), question, [pattern], is_pattern=True
        )

    return parsed_lines(
        Path(source.path), "tab-separated lines of number, kind, question and regular expression", report, parse
    )


def _alternatives(column: str) -> str:
    """Join a list of regular expressions, possibly quoted as in CSV, into one.

    A column that is not a list is returned unchanged.
    """
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
    entries = read_json(path, "a list of WebQuestions questions")
    if not isinstance(entries, list):
        raise UserError(f"{path} is not in WebQuestions format: expected a list of objects with qText and answers.")
    for number, entry in enumerate(entries):
        place = Place(f"{path}, record {number}")
        try:
            if not isinstance(entry, dict) or "qText" not in entry or "answers" not in entry:
                raise BadRecord("missing qText or answers")
            yield checked_question(
                place, number if entry.get("qId") is None else entry["qId"], entry["qText"], entry["answers"]
            )
        except BadRecord as bad:
            report.add(place, bad.kind, bad.detail)


def _read_squad(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """SQuAD 1.1 and 2.0; questions marked as impossible are counted as unanswerable.

    A paragraph may contain the id of its document in `passage`.
    """
    path = Path(source.path)
    squad = read_json(path, "SQuAD articles")
    if not isinstance(squad, dict) or not isinstance(squad.get("data"), list):
        raise UserError(f'question file {path} is not in SQuAD format: expected an object with a list under "data".')
    titles = [_plain(str(article.get("title") or "")) if isinstance(article, dict) else "" for article in squad["data"]]
    wanted, excluded = {_plain(name) for name in source.articles}, {_plain(name) for name in source.exclude_articles}
    if missing := sorted((wanted | excluded) - set(titles)):
        raise UserError(f"question file {path} has no article {missing[0]!r}; check `articles` and `exclude_articles`.")
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
            report.add(place, "not a SQuAD article", f" ({error!r})")


def _squad_question(
    place: Place, entry: dict[str, Any], context: str | None, passage: str | None, article: str
) -> QuestionRecord:
    try:
        answers = [] if entry.get("is_impossible") else entry["answers"]
        texts = [answer["text"] for answer in answers]
        starts = tuple(answer["answer_start"] for answer in answers if isinstance(answer.get("answer_start"), int))
        return checked_question(
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
        raise BadRecord("not a SQuAD question", f" ({error!r})") from None


def _plain(title: str) -> str:
    """The title with spaces instead of underscores."""
    return title.replace("_", " ")


def _read_timeqa(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """TimeQA: a list of articles, each with `questions`; the article's link is its id.

    A question is `[question, [{"para", "from", "end", "answer"}, …]]`.
    """
    path = Path(source.path)
    articles = read_json(path, "a list of TimeQA articles")
    for a, article in enumerate(articles if isinstance(articles, list) else [articles]):
        place = Place(f"{path}, record {a}")
        try:
            link, paragraphs, questions = article["link"], article["paras"], article["questions"]
            offsets = [sum(len(part) + 2 for part in paragraphs[:number]) for number in range(len(paragraphs))]
            for q, (text, answers) in enumerate(questions):
                place = Place(f"{path}, record {a}, question {q}")
                try:
                    starts = tuple(offsets[answer["para"]] + answer["from"] for answer in answers)
                    yield checked_question(
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
            report.add(place, "not a TimeQA article", f" ({error!r})")


def _read_datasets(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """A Hugging Face dataset: a folder written by `save_to_disk`, or a name on the hub."""
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
"""Functions that read each format, by the name used in configs."""
