"""Documents read from what people have, and every way in which a record can be wrong. The
formats themselves are in `document_formats`."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from realm.corpus.formats import read_records
from realm.corpus.sources import SourceConfig
from realm.corpus.text_files import BadRecord, BadRecords, Place, check_text, json_type
from realm.errors import UserError


class Document(NamedTuple):
    """One record of the input; `text` is not changed in any way."""

    id: str
    title: str
    text: str


def read_documents(
    sources: Sequence[SourceConfig], skip_bad: bool = False, report: BadRecords | None = None
) -> Iterator[Document]:
    """Yields the documents of all sources one after the other, each in its order, one of each id.

    `id` (text, or a whole number, kept as its digits) and `text` are required, `title` is "" where
    missing or null, other fields are ignored. Records that cannot be used (unreadable as their
    format asks, a field missing or of the wrong type, no visible character, an id seen before or
    confusable with the number of a block, the rest of a truncated file) are noted in `report`.

    Raises UserError at once where a source cannot be read, and, *after the last record*, the whole
    report unless `skip_bad`: who must not act on half a corpus reads to the end first. The ids are
    held in memory.
    """
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
                "id confusable with a block",
                f" {document_id!r}: blocks of a document A are named A#0, A#1; the other is {other.seen_from(place)}",
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
        check_text(value, f' in "{name}"')
        values.append(value)
    document = Document(*values)
    if not document.id:
        raise BadRecord('empty "id"')
    if not any(map(_is_visible, document.text)):
        raise BadRecord('empty "text"')
    return document


def _is_visible(character: str) -> bool:
    """Letter, digit, punctuation or symbol: a tokenizer drops white space, control characters
    and lone accents."""
    return unicodedata.category(character)[0] in "LNPS" and character != "\ufffd"
