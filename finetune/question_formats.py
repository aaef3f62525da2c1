"""Question formats: one function per format yields the records of a source; see `FORMATS`."""

import ast
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.patterns import AnswerPattern
from finetune.question_record import QuestionRecord, checked_question, question_number
from realm.corpus.qa_files import TIMEQA_SEPARATOR, squad_articles, timeqa_articles, timeqa_document
from realm.corpus.records import BadRecord, BadRecords, Place, expect, expect_field, missing_field
from realm.corpus.tables import parsed_rows
from realm.corpus.text_files import (
    check_file,
    decoded,
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
from realm.runtime.hub import damage_refused, dataset_batches, load_split


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
        ("name", ("datasets",)),
        ("split", ("datasets",)),
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
        raise missing_field(" or ".join(names), record)

    answers = get("answers", "answer")
    if isinstance(answers, dict):  # as in SQuAD and TriviaQA on the hub
        answers = answers.get("text", answers.get("aliases", answers))
    identity = [source.fields["id"]] if "id" in source.fields else ["id", "question_id"]
    name = next((record[key] for key in identity if record.get(key) is not None), question_number(place))
    context, passage = (record.get(source.fields.get(field, field)) for field in ("context", "passage"))
    if "context" not in source.fields and not isinstance(context, str):
        context = None  # another kind of context, such as the paragraphs of HotpotQA
    if "passage" not in source.fields and not isinstance(passage, str | int):
        passage = None
    return checked_question(place, name, get("question"), answers, context=context, passage=passage)


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escapes such as "\\s" in patterns
            warnings.simplefilter("ignore", DeprecationWarning)
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

    def parse(place: Place, line: bytes) -> QuestionRecord:
        columns = decoded(line).rstrip("\r\n").split("\t")
        if len(columns) not in (2, 4):
            raise BadRecord("expected 4 columns (number, kind, question, pattern)", f", got {len(columns)}")
        question, pattern = columns[-2], columns[-1]
        if len(columns) == 2:
            pattern = _alternatives(pattern)
        try:
            AnswerPattern(pattern).check()
        except ValueError as error:
            raise BadRecord("invalid regular expression", f" ({error}): {pattern[:60]!r}") from None
        name = columns[0] if len(columns) == 4 else question_number(place)
        return checked_question(place, name, question, [pattern], is_pattern=True)

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
        with report.skipping(place):
            record = expect(entry, dict, "the question")
            for field in ("qText", "answers"):
                if field not in record:
                    raise missing_field(field, record)
            name = number if record.get("qId") is None else record["qId"]
            yield checked_question(place, name, record["qText"], record["answers"])


def _read_squad(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """SQuAD 1.1 and 2.0; questions marked as impossible are counted as unanswerable.

    A paragraph may contain the id of its document in `passage`.
    """
    path = Path(source.path)
    articles = squad_articles(path)
    titles = [_plain(str(article.get("title") or "")) if isinstance(article, dict) else "" for article in articles]
    wanted, excluded = {_plain(name) for name in source.articles}, {_plain(name) for name in source.exclude_articles}
    if missing := sorted((wanted | excluded) - set(titles)):
        raise UserError(f"question file {path} has no article {missing[0]!r}; check `articles` and `exclude_articles`.")
    for a, (title, article) in enumerate(zip(titles, articles, strict=True)):
        if (wanted and title not in wanted) or title in excluded:
            continue
        with report.skipping(Place(f"{path}, data[{a}]")):
            for p, paragraph in enumerate(expect_field(article, "paragraphs", list, "the SQuAD article")):
                place = Place(f"{path}, data[{a}].paragraphs[{p}]")
                with report.skipping(place):
                    for q, entry in enumerate(expect_field(paragraph, "qas", list, "the SQuAD paragraph")):
                        question_place = Place(f"{place}.qas[{q}]")
                        with report.skipping(question_place):
                            yield _squad_question(question_place, entry, paragraph, title)


def _squad_question(place: Place, entry: object, paragraph: dict[str, Any], article: str) -> QuestionRecord:
    text = expect_field(entry, "question", str, "the SQuAD question")
    record = expect(entry, dict, "the SQuAD question")
    if "id" not in record:
        raise missing_field("id", record)
    answers = [] if record.get("is_impossible") else expect_field(record, "answers", list, "the SQuAD question")
    texts = [expect_field(answer, "text", str, "the answer") for answer in answers]
    starts = tuple(
        expect(answer["answer_start"], int, "answer_start") for answer in answers if "answer_start" in answer
    )
    return checked_question(
        place,
        record["id"],
        text,
        texts,
        context=paragraph.get("context"),
        passage=paragraph.get("passage"),
        starts=starts,
        article=article,
    )


def _plain(title: str) -> str:
    """The title with spaces instead of underscores."""
    return title.replace("_", " ")


def _read_timeqa(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """TimeQA: a list of articles, each with `questions`; the article's link is its id.

    A question is `[question, [{"para", "from", "end", "answer"}, …]]`.
    """
    for place, article in timeqa_articles(Path(source.path)):
        with report.skipping(place):
            link, paragraphs = timeqa_document(article)
            starts = [0, *accumulate(len(paragraph) + len(TIMEQA_SEPARATOR) for paragraph in paragraphs[:-1])]
            index = expect_field(article, "index", str, "the TimeQA article")
            for q, question in enumerate(expect_field(article, "questions", list, "the TimeQA article")):
                question_place = Place(f"{place}, question {q}")
                with report.skipping(question_place):
                    parts = expect(question, list, "the TimeQA question")
                    if len(parts) != 2:
                        raise BadRecord("the TimeQA question has not two parts", f" but {len(parts)}")
                    answers = [_timeqa_answer(answer, starts) for answer in expect(parts[1], list, "answers")]
                    yield checked_question(
                        question_place,
                        f"{index}/{q}",
                        parts[0],
                        [text for text, _ in answers],
                        passage=link,
                        starts=tuple(start for _, start in answers),
                    )


def _timeqa_answer(answer: object, starts: list[int]) -> tuple[str, int]:
    """Text of an answer and its offset in the article; `starts`: those of the paragraphs."""
    number, begin = (expect_field(answer, name, int, "the answer") for name in ("para", "from"))
    if not 0 <= number < len(starts):
        raise BadRecord("the answer is in no paragraph", f": para is {number}, of {len(starts)}")
    return expect_field(answer, "answer", str, "the answer"), starts[number] + begin


def _read_datasets(source: QuestionSource, report: BadRecords) -> Iterator[QuestionRecord]:
    """A Hugging Face dataset: a folder written by `save_to_disk`, or a name on the hub."""
    batches = dataset_batches(load_split(source.path, source.name, source.split))
    with damage_refused(source.path):
        yield from parsed_rows(batches, source.path, report, lambda place, row: _from_fields(place, row, source))


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
