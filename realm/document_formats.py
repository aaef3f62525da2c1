"""The formats in which people have documents, each a function from a source to records; `FORMATS` is the registry.

A format reads, names places, and puts fields under their names here; what makes a record a document is judged in `documents`.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from realm.errors import UserError
from realm.files import BadRecord, BadRecords, Place, check_file, json_type, lines, named_format, parsed_lines, read_json, stem
from realm.hub import require_on_hub

FIELDS = ("id", "title", "text")
"""What a document has."""

_SUFFIXES = {".jsonl": "jsonl", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_TEXT_SUFFIXES = (".txt", ".md")
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents; in YAML its path alone may stand for it."""

    SHORTHAND: ClassVar[str] = "path"

    path: str
    """File or folder, `builtin:NAME` for a file of the built-in corpus, or (format `datasets`) a name on the Hugging Face hub."""
    format: str = "auto"
    """`jsonl`, `tsv` (DPR's passages), `parquet`, `squad`, `timeqa`, `text` (a folder of text files) or `datasets`; `auto`: by the path's
    suffix, or by what a folder holds."""
    fields: dict[str, str] = field(default_factory=dict)
    """Where `id`, `title` and `text` stand if not under these names: `{text: contents}`; `{id: "#"}` numbers the records."""
    name: str | None = None
    """Configuration of a data set on the hub, such as `20231101.en` of `wikimedia/wikipedia`."""
    split: str = "train"
    """Split of a data set on the hub or in a folder of splits."""
    limit: int | None = None
    """Read no more than this many documents."""

    def __post_init__(self) -> None:
        if unknown := set(self.fields) - set(FIELDS):
            raise UserError(f"corpus: `fields` of {self.path} maps {', '.join(sorted(unknown))}; a document has id, title and text.")


class Record(NamedTuple):
    """What a format hands over: a place to report, and the fields under their names here."""

    place: Place
    fields: dict[str, object]


def read_records(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """The records of one source in its order; those that its format cannot take apart are noted in `report`.

    Raises UserError where the source cannot be read at all, or its format is not known.
    """
    return FORMATS[format_of(source)](source, report)


def format_of(source: SourceConfig) -> str:
    """The format by name. Raises UserError where it is unknown, or cannot be told from the path and has to be named."""
    if named := named_format(source.format, FORMATS, source.path):
        return named
    path = Path(source.path)
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        if names & set(_DATASET_FILES):
            return "datasets"
        kinds = {_SUFFIXES[file.suffix] for file in path.rglob("*") if file.is_file() and file.suffix in (".parquet", *_TEXT_SUFFIXES)}
        if len(kinds) == 1:
            return kinds.pop()
        found = "both Parquet and text files" if kinds else "neither a saved data set nor Parquet nor text files"
        raise UserError(f"{path} is a folder of {found}; name its format, one of {', '.join(FORMATS)}")
    _, suffix = stem(path)
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if not path.exists():
        raise UserError(f"{path} does not exist; for a data set on the Hugging Face hub set `format: datasets`")
    raise UserError(f"the format of {path} cannot be told from its name; name it, one of {', '.join(FORMATS)}")


def _mapped(record: dict[str, Any], source: SourceConfig, number: int) -> dict[str, object]:
    """The record under our names: `fields` of the source moves some, the others stay."""
    if not source.fields:
        return record
    taken = set(source.fields.values())
    mapped: dict[str, object] = {name: value for name, value in record.items() if name not in taken and name not in source.fields}
    for name, theirs in source.fields.items():
        if theirs == "#":
            mapped[name] = number
        elif theirs in record:
            mapped[name] = record[theirs]
        elif name != "title":
            raise BadRecord(f'no field "{theirs}" (for {name})', f"; the record has {', '.join(sorted(record)) or 'no fields'}")
    return mapped


def _read_jsonl(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """One JSON object a line."""
    numbers = itertools.count()

    def parse(place: Place, line: bytes) -> Record:
        number = next(numbers)
        return Record(place, _mapped(parse_object(line), source, number))

    return parsed_lines(Path(source.path), "one JSON object a line", report, parse)


def parse_object(line: bytes) -> dict[str, Any]:
    """A line of JSONL. Raises BadRecord."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecord("broken JSON", f" ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object", f" but {json_type(record)}")
    return record


def parse_tsv(line: bytes) -> list[str]:
    """The fields of a tab-separated line with CSV quoting, as DPR's files have it. Raises BadRecord, also for a quote that is not closed."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None
    if '"' not in text:
        return text.split("\t")
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        return next(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error as error:
        raise BadRecord("broken quoting", f" ({error})") from None


def _read_tsv(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """DPR's `psgs_w100.tsv`: a line of column names (id, text, title), then a passage a line."""
    path = Path(source.path)
    check_file(path, "tab-separated lines of id, text and title, the first with these names")
    columns: list[str] = []
    for number, (place, line) in enumerate(lines(path, report.add), -1):
        try:
            values = parse_tsv(line)
            if not columns:
                columns = values
                wanted = [source.fields.get(name, name) for name in ("id", "text")]
                if missing := [name for name in wanted if name != "#" and name not in columns]:
                    raise UserError(f"{place}: the first line must name the columns, and {', '.join(missing)} is not among {', '.join(columns[:8])}")
                continue
            if len(values) != len(columns):
                raise BadRecord(f"not {len(columns)} columns", f" but {len(values)}")
            yield Record(place, _mapped(dict(zip(columns, values, strict=True)), source, number))
        except BadRecord as bad:
            report.add(place, bad.kind, bad.detail)


def _read_parquet(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """A Parquet file, or all those of a folder in the order of their names."""
    import pyarrow as pa
    import pyarrow.parquet

    path = Path(source.path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .parquet file")
    number = 0
    for file in files:
        check_file(file, "a Parquet table")
        try:
            table = pa.parquet.ParquetFile(file)
            wanted = {source.fields.get(name, name) for name in FIELDS}
            columns = [name for name in table.schema_arrow.names if name in wanted]
            if missing := sorted(wanted - set(columns) - {"#", source.fields.get("title", "title")}):
                raise UserError(f"{file} has no column {', '.join(missing)} but {', '.join(table.schema_arrow.names)}; map them with `fields`")
            row = 0
            for batch in table.iter_batches(1000, columns=columns):
                for record in batch.to_pylist():
                    row, number = row + 1, number + 1
                    yield Record(Place(str(file), row), _mapped(record, source, number - 1))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is no Parquet file that can be read ({str(error).splitlines()[0]})") from error


def _read_squad(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """The paragraphs of a SQuAD file (1.1 or 2.0): ids `Title/0`, `Title/1` …, underscores of the title as blanks."""
    path = Path(source.path)
    squad = read_json(path, "SQuAD's articles")
    if not isinstance(squad, dict) or not isinstance(squad.get("data"), list):
        raise UserError(f'{path} is not in SQuAD format: it must be an object with a list under "data"')
    for article in squad["data"]:
        try:
            title, contexts = article["title"], [paragraph["context"] for paragraph in article["paragraphs"]]
        except (KeyError, TypeError) as error:
            report.add(Place(str(path)), "not an article of SQuAD", f" ({error!r} is missing in {str(article)[:60]!r})")
            continue
        for number, context in enumerate(contexts):
            place = Place(f"{path}, {title!r}, paragraph {number}")
            yield Record(place, {"id": f"{title}/{number}", "title": str(title).replace("_", " "), "text": context})


def _read_timeqa(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """The articles of a TimeQA file, each once: id is their link, paragraphs stand apart by an empty line."""
    path = Path(source.path)
    articles = read_json(path, "TimeQA's list of articles")
    seen: set[str] = set()
    for number, article in enumerate(articles if isinstance(articles, list) else [articles]):
        place = Place(f"{path}, record {number}")
        try:
            link, paragraphs = article["link"], article["paras"]
            text, title = "\n\n".join(paragraphs), link.rsplit("/", 1)[-1].replace("_", " ")
        except (KeyError, TypeError, AttributeError) as error:
            report.add(place, "not an article of TimeQA", f" ({error!r})")
            continue
        if link not in seen:  # an article stands there once for each relation that is asked about
            seen.add(link)
            yield Record(place, {"id": link, "title": title, "text": text})


def text_files(folder: Path) -> list[Path]:
    """The text files of a folder and its subfolders, in the order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in _TEXT_SUFFIXES)


def _read_text(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """A folder of `.txt` and `.md` files: the path inside it is the id, the name the title. A single file is one document."""
    root = Path(source.path)
    files = text_files(root) if root.is_dir() else [root]
    if not files:
        raise UserError(f"{root} holds no file ending in {' or '.join(_TEXT_SUFFIXES)}")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            report.add(Place(str(file)), "not UTF-8", f", byte {error.start + 1}")
            continue
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        yield Record(Place(str(file)), {"id": name, "title": file.stem.replace("_", " "), "text": text})


def _read_datasets(source: SourceConfig, report: BadRecords) -> Iterator[Record]:
    """A data set of the Hugging Face library: a folder made by `save_to_disk`, or a name on the hub."""
    dataset = load_split(source.path, source.name, source.split)
    wanted = {source.fields.get(name, name) for name in FIELDS}
    if missing := sorted(wanted - set(dataset.column_names) - {"#", source.fields.get("title", "title")}):
        raise UserError(f"data set {source.path} has no column {', '.join(missing)} but {', '.join(dataset.column_names)}; map them with `fields`")
    rows: Iterable[dict] = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    for number, record in enumerate(rows):
        place = Place(source.path, number + 1)
        try:
            yield Record(place, _mapped(record, source, number))
        except BadRecord as bad:
            report.add(place, bad.kind, bad.detail)


def load_split(path: str, name: str | None, split: str) -> Any:
    """One split of a data set, saved in a folder or on the hub. Raises UserError naming it where it cannot be had."""
    import datasets

    if Path(path).is_dir():
        try:
            loaded = datasets.load_from_disk(path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no data set saved by the datasets library ({str(error).splitlines()[0]})") from error
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise UserError(f"data set {path} has no split {split!r} but {', '.join(map(str, loaded))}")
            return loaded[split]
        return loaded
    require_on_hub(path, "data set", kind="dataset")
    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        raise UserError(f"data set {path} cannot be loaded ({str(error).splitlines()[0]}); check `name` and `split`") from error


FORMATS: dict[str, Callable[[SourceConfig, BadRecords], Iterator[Record]]] = {
    "jsonl": _read_jsonl,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "squad": _read_squad,
    "timeqa": _read_timeqa,
    "text": _read_text,
    "datasets": _read_datasets,
}
"""Reader of each format by the name used in configs."""


def source_files(source: SourceConfig) -> list[Path]:
    """The files that decide what a source holds, in a fixed order; none where it lies on the hub."""
    path = Path(source.path)
    if format_of(source) == "text" and path.is_dir():
        return text_files(path)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.exists() else []
