"""Documents read from what people have, and every way in which a record can be wrong. The formats themselves are in `document_formats`."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from realm.errors import UserError
from realm.files import Place, json_type


class Document(NamedTuple):
    """One record of the input; `text` is not changed in any way."""

    id: str
    title: str
    text: str


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
        if unknown := set(self.fields) - set(Document._fields):
            raise UserError(f"corpus: `fields` of {self.path} maps {', '.join(sorted(unknown))}; a document has id, title and text.")


class Record(NamedTuple):
    """What a format hands over: a place to report, and the fields under the names of `Document`."""

    place: Place
    fields: dict[str, object]


@dataclass
class BadRecords:
    """The records that cannot be used: the first twenty with place and reason, all of them counted by kind."""

    first: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, place: Place, kind: str, detail: str = "") -> None:
        if len(self.first) < 20:
            self.first.append(f"{place}: {kind}{detail}")
        self.counts[kind] += 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        lines = [f"{self.total} {'record' if self.total == 1 else 'records'} cannot be used:", *("  " + line for line in self.first)]
        if (more := self.total - len(self.first)) > 0:
            lines.append(f"  … and {more} more; in all " + ", ".join(f"{n} x {kind}" for kind, n in self.counts.most_common()))
        return "\n".join(lines)


class BadRecord(Exception):
    """Why a record is not a document: kind and detail."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind + detail)
        self.kind, self.detail = kind, detail


def read_documents(sources: Sequence[SourceConfig], skip_bad: bool = False, report: BadRecords | None = None) -> Iterator[Document]:
    """Yields the documents of all sources one after the other, each in its order, one of each id.

    `id` (text, or a whole number, kept as its digits) and `text` are required, `title` is "" where missing or null, other fields are
    ignored. Records that cannot be used (unreadable as their format asks, a field missing or of the wrong type, no visible character, an
    id seen before or confusable with the number of a block, the rest of a truncated file) are noted in `report`.

    Raises UserError at once where a source cannot be read, and, *after the last record*, the whole report unless `skip_bad`: who must not
    act on half a corpus reads to the end first. The ids are held in memory.
    """
    from realm.document_formats import read_records

    report = BadRecords() if report is None else report
    seen = _Ids()
    for source in sources:
        count = 0
        if source.limit == 0:
            continue
        for record in read_records(source, report):
            try:
                document = _parse(record.fields)
                seen.add(document.id, record.place)
            except BadRecord as bad:
                report.add(record.place, bad.kind, bad.detail)
                continue
            yield document
            count += 1
            if count == source.limit:
                break
    if report.total and not skip_bad:
        raise UserError(f"{report}\nMend them, or leave them out with --skip-bad.")
    if not seen.place_of:
        names = ", ".join(source.path for source in sources)
        raise UserError(f"{names} holds no document" + (f" that can be used\n{report}" if report.total else ""))


class _Ids:
    """Ids seen so far. `a#0` beside `a` is refused: blocks of the document `a` bear such ids."""

    def __init__(self) -> None:
        self.place_of: dict[str, Place] = {}
        self._numbered: dict[str, Place] = {}

    def add(self, document_id: str, place: Place) -> None:
        if (first := self.place_of.get(document_id)) is not None:
            raise BadRecord("duplicate id", f" {document_id!r}, first {first.seen_from(place)}")
        base, separator, number = document_id.rpartition("#")
        is_numbered = bool(separator) and number.isdecimal()
        other = self.place_of.get(base) if is_numbered else self._numbered.get(document_id)
        if other is not None:
            raise BadRecord(
                "id confusable with a block", f" {document_id!r}: blocks of a document A are named A#0, A#1; the other is {other.seen_from(place)}"
            )
        self.place_of[document_id] = place
        if is_numbered:
            self._numbered.setdefault(base, place)


def _parse(record: dict[str, object]) -> Document:
    document_id = record.get("id")
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        record = {**record, "id": str(document_id)}
    values = []
    for name in Document._fields:
        value = record.get(name)
        if name == "title" and value is None:
            values.append("")
            continue
        if name not in record:
            raise BadRecord(f'no field "{name}"', f"; the record has {', '.join(sorted(record)) or 'no fields'}")
        if not isinstance(value, str):
            raise BadRecord(f'"{name}" is not text', f" but {json_type(value)}")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise BadRecord("half of a surrogate pair", f' in "{name}"')
        values.append(value)
    document = Document(*values)
    if not document.id:
        raise BadRecord('empty "id"')
    if not any(map(_is_visible, document.text)):
        raise BadRecord('empty "text"')
    return document


def _is_visible(character: str) -> bool:
    """Letter, digit, punctuation or symbol: a tokenizer drops white space, control characters and lone accents."""
    return unicodedata.category(character)[0] in "LNPS" and character != "\ufffd"


def source_files(source: SourceConfig) -> list[Path]:
    """The files that decide what a source holds, in a fixed order; none where it lies on the hub."""
    from realm.document_formats import format_of, text_files

    path = Path(source.path)
    if format_of(source) == "text" and path.is_dir():
        return text_files(path)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.exists() else []
