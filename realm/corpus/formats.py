"""Document formats: one function per format yields the records of a source; see `FORMATS`.

A format parses the records, gives their positions, and maps their fields to `id`, `title` and
`text`. `realm.corpus.documents` validates the records.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from realm.corpus.qa_files import TIMEQA_SEPARATOR, squad_articles, timeqa_articles, timeqa_document
from realm.corpus.records import BadRecord, BadRecords, Place, expect_field, missing_field
from realm.corpus.sources import SourceConfig
from realm.corpus.tables import parsed_rows
from realm.corpus.text_files import (
    check_file,
    detect_by_key,
    files_below,
    lines,
    named_format,
    parse_object,
    parse_tsv,
    parsed_lines,
    read_text,
    stem,
)
from realm.errors import UserError, first_line, shortened
from realm.runtime.hub import damage_refused, dataset_batches, load_split

_SUFFIXES = {".jsonl": "jsonl", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


class Record(NamedTuple):
    """A parsed record: its position for messages, and its fields, mapped to our names."""

    place: Place
    fields: dict[str, object]


def read_records(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """Yield the records of one source in order; records that cannot be parsed go to `report`.

    Raises UserError if the source cannot be read or its format is unknown.
    """
    name = format_of(source)
    if source.fields and name in ("squad", "timeqa", "text"):
        raise UserError(
            f"`fields` of {source.path} cannot be used: the format {name} has fixed fields; remove `fields`."
        )
    for option in ("name", "split"):
        if getattr(source, option) is not None and name != "datasets":
            raise UserError(
                f"`{option}` of {source.path} is only for the format datasets, but the format is {name}; remove it."
            )
    return FORMATS[name](source, report)


def format_of(source: SourceConfig) -> str:
    """Name of the source's format, auto-detected if it is `auto`.

    Raises UserError if the format is unknown or cannot be detected.
    """
    if named := named_format(source.format, FORMATS, source.path):
        return named
    path = Path(source.path)
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        if names & set(_DATASET_FILES):
            return "datasets"
        kinds = sorted({kind for file in files_below(path) if (kind := _kind(file))})
        if len(kinds) == 1:
            return kinds[0]
        found = (
            f"{' and '.join(kinds)} files"
            if kinds
            else f"neither a saved dataset nor files ending in {', '.join(_SUFFIXES)}"
        )
        raise UserError(f"{path} is a folder with {found}; set its `format` to one of {', '.join(FORMATS)}.")
    if kind := _kind(path):
        return kind
    if not path.exists():
        raise UserError(f"{path} does not exist; for a dataset on the Hugging Face hub set `format: datasets`.")
    if stem(path)[1] == ".json" and (kind := detect_by_key(path, "documents", {"squad": "data", "timeqa": "paras"})):
        return kind
    raise UserError(f"the format of {path} cannot be auto-detected; set `format` to one of {', '.join(FORMATS)}.")


def _kind(file: Path) -> str | None:
    """Format by the suffix of a file, or None."""
    return _SUFFIXES.get(stem(file)[1])


def files_of(source: SourceConfig, kind: str) -> list[Path]:
    """The file of a source, or all files of format `kind` below its folder, sorted by path.

    Raises UserError if the folder contains none.
    """
    root = Path(source.path)
    files = [file for file in files_below(root) if _kind(file) == kind] if root.is_dir() else [root]
    if not files:
        suffixes = " or ".join(suffix for suffix, name in _SUFFIXES.items() if name == kind)
        raise UserError(f"{root} contains no files ending in {suffixes}; check the path, or set `format`.")
    return files


def _mapped(record: dict[str, Any], source: SourceConfig, number: int) -> dict[str, object]:
    """Map the fields of a record by the `fields` of its source; other fields are unchanged."""
    if not source.fields:
        return record
    mapped_from = set(source.fields.values())
    mapped: dict[str, object] = {
        name: value for name, value in record.items() if name not in mapped_from and name not in source.fields
    }
    for name, theirs in source.fields.items():
        if name == "id" and source.id_template:
            mapped[name] = theirs.replace("#", str(number))
        elif theirs in record:
            mapped[name] = record[theirs]
        elif name != "title":
            raise missing_field(theirs, record, f" (mapped to {name})")
    return mapped


def _read_jsonl(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """One JSON object per line."""
    number, title_field = 0, source.fields.get("title")
    without_title = 0

    def parse(place: Place, line: bytes) -> Record:
        nonlocal number, without_title
        number += 1
        record = parse_object(line)
        without_title += title_field is not None and title_field not in record
        return Record(place, _mapped(record, source, number - 1))

    for file in files_of(source, "jsonl"):
        yield from parsed_lines(file, "one JSON object per line", report, parse)
    if number and without_title == number:
        report.add(Place(source.path), f'missing field "{title_field}" (mapped to title)', " in all records")


def _table_columns(source: SourceConfig, names: list[str], table: str) -> list[str]:
    """The columns of a table that are read. Raises UserError if one is missing or appears twice."""
    columns, missing = source.columns(names)
    if missing:
        present = shortened(", ".join(names))
        raise UserError(f"{table} has no column {', '.join(missing)}; map its columns ({present}) with `fields`.")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{table} has two columns {twice}; remove or rename one.")
    return columns


def _read_tsv(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """DPR's `psgs_w100.tsv`: a header (id, text, title), then one passage per line."""
    number = 0
    for file in files_of(source, "tsv"):
        check_file(file, "tab-separated lines of id, text and title with a header")
        columns: list[str] = []
        for place, line in lines(file, report.add):
            try:
                values = parse_tsv(line)
                if not columns:
                    columns = values
                    _table_columns(source, columns, f"{place}: the header")
                    continue
                number += 1
                if len(values) != len(columns):
                    raise BadRecord(f"expected {len(columns)} columns", f", got {len(values)}")
                yield Record(place, _mapped(dict(zip(columns, values, strict=True)), source, number - 1))
            except BadRecord as bad:
                report.add(place, bad.kind, bad.detail)


def _read_parquet(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """A Parquet file, or all Parquet files of a folder, sorted by path."""
    import pyarrow as pa
    import pyarrow.parquet

    numbers = count()
    for file in files_of(source, "parquet"):
        check_file(file, "a Parquet table")
        try:
            table = pa.parquet.ParquetFile(file)
            batches = table.iter_batches(1000, columns=_table_columns(source, table.schema_arrow.names, str(file)))
            yield from parsed_rows(batches, str(file), report, partial(_row, source, numbers))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a readable Parquet file ({first_line(error)}).") from error


def _row(source: SourceConfig, numbers: Iterator[int], place: Place, row: dict[str, Any]) -> Record:
    """The record of a table's row; `numbers` counts the rows of the source."""
    return Record(place, _mapped(row, source, next(numbers)))


def _read_squad(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """The paragraphs of a SQuAD file (1.1 or 2.0) with the ids `Title/0`, `Title/1`, ….

    Underscores in titles become spaces.
    """
    path = Path(source.path)
    for a, article in enumerate(squad_articles(path)):
        with report.skipping(Place(f"{path}, data[{a}]")):
            title = expect_field(article, "title", str, "the SQuAD article")
            for p, paragraph in enumerate(expect_field(article, "paragraphs", list, "the SQuAD article")):
                place = Place(f"{path}, data[{a}].paragraphs[{p}]")
                with report.skipping(place):
                    text = expect_field(paragraph, "context", str, "the SQuAD paragraph")
                    yield Record(place, {"id": f"{title}/{p}", "title": title.replace("_", " "), "text": text})


def _read_timeqa(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """The distinct articles of a TimeQA file; the id is the link.

    Paragraphs are separated by an empty line.
    """
    seen: set[str] = set()
    for place, article in timeqa_articles(Path(source.path)):
        with report.skipping(place):
            link, paragraphs = timeqa_document(article)
            if link not in seen:  # the file repeats an article for each relation that is asked about
                seen.add(link)
                title = link.rsplit("/", 1)[-1].replace("_", " ")
                yield Record(place, {"id": link, "title": title, "text": TIMEQA_SEPARATOR.join(paragraphs)})


def _read_text(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """A folder of `.txt` and `.md` files, or a single file; each file is one document.

    The id is the path within the folder, the title is the name without suffix.
    """
    root = Path(source.path)
    for file in files_of(source, "text"):
        try:
            text = read_text(file)
        except UnicodeDecodeError as error:
            report.add(Place(str(file)), "not UTF-8", f", byte {error.start + 1}")
            continue
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        yield Record(Place(str(file)), {"id": name, "title": stem(file)[0].replace("_", " "), "text": text})


def _read_datasets(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """A Hugging Face dataset: a folder written by `save_to_disk`, or a name on the hub."""
    dataset = load_split(source.path, source.name, source.split)
    columns = _table_columns(source, dataset.column_names, f"dataset {source.path}")
    with damage_refused(source.path):
        batches = dataset_batches(dataset.select_columns(columns))
        yield from parsed_rows(batches, source.path, report, partial(_row, source, count()))


FORMATS: dict[str, Callable[[SourceConfig, BadRecords], Iterator[Record]]] = {
    "jsonl": _read_jsonl,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "squad": _read_squad,
    "timeqa": _read_timeqa,
    "text": _read_text,
    "datasets": _read_datasets,
}
"""Functions that read each format, by the name used in configs."""


def source_files(source: SourceConfig) -> list[Path]:
    """The files that a source is read from, in a fixed order; none for a dataset on the hub."""
    path, kind = Path(source.path), format_of(source)
    if not path.is_dir():
        return [path] if path.exists() else []
    return files_of(source, kind) if kind in _SUFFIXES.values() else files_below(path)


def count_ignored(source: SourceConfig) -> int:
    """Number of files in a source's folder that are skipped because of their format."""
    path = Path(source.path)
    return len(files_below(path)) - len(source_files(source)) if path.is_dir() else 0
