"""Reading and validation of documents. The file formats are in `realm.corpus.formats`."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from realm.corpus.formats import read_records
from realm.corpus.records import BadRecord, BadRecords, Place, check_text, json_type
from realm.corpus.sources import SourceConfig
from realm.errors import UserError


class Document(NamedTuple):
    """One record of the input; `text` is unchanged."""

    id: str
    title: str
    text: str


def read_documents(
    sources: Sequence[SourceConfig], skip_bad: bool = False, report: BadRecords | None = None
) -> Iterator[Document]:
    """Yield the documents of all sources in order; ids are unique across the sources.

    `id` (a string, or an integer, which is converted to a string) and `text` are required; `title`
    is "" if missing or null; other fields are ignored. Records that cannot be used are added to
    `report`: not valid in their format, a field missing or of the wrong type, no visible
    characters, a duplicate id, an id that conflicts with the ids of blocks, or the rest of a
    truncated file.

    Raises UserError immediately if a source cannot be read and, unless `skip_bad`, *after the last
    record* with the complete report. A caller that must not process an incomplete corpus therefore
    has to read to the end first. All ids are kept in memory.
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
        raise UserError(f"{report}\nFix these records, or skip them with --skip-bad.")
    if not seen.place_of:
        names = ", ".join(source.path for source in sources)
        raise UserError(f"no usable documents in {names}." + (f"\n{report}" if report.total else ""))


class _Ids:
    """Document ids seen so far.

    The ids `a` and `a#0` conflict, because `a#0` is also the id of a block of document `a`.
    """

    def __init__(self) -> None:
        self.place_of: dict[str, Place] = {}
        self._numbered: dict[str, Place] = {}

    def add(self, document_id: str, place: Place) -> None:
        if (first := self.place_of.get(document_id)) is not None:
            raise BadRecord("duplicate id", f" {document_id!r}, first used {first.relative_to(place)}")
        base, separator, number = document_id.rpartition("#")
        is_numbered = bool(separator) and number.isdecimal()
        other = self.place_of.get(base) if is_numbered else self._numbered.get(document_id)
        if other is not None:
            raise BadRecord(
                "id conflicts with block ids",
                f": {document_id!r} (blocks of a document A have the ids A#0, A#1, …; "
                f"the conflicting document is {other.relative_to(place)})",
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
            raise BadRecord(f'missing field "{name}"', f"; the record has {', '.join(sorted(record)) or 'no fields'}")
        if not isinstance(value, str):
            raise BadRecord(f'"{name}" is not a string', f" but {json_type(value)}")
        check_text(value, f' in "{name}"')
        values.append(value)
    document = Document(*values)
    if not document.id:
        raise BadRecord('empty "id"')
    if not any(map(_is_visible, document.text)):
        raise BadRecord('empty "text"')
    return document


def _is_visible(character: str) -> bool:
    """Whether it is a letter, digit, punctuation mark or symbol.

    A tokenizer drops white space, control characters and lone accents.
    """
    return unicodedata.category(character)[0] in "LNPS" and character != "\ufffd"
