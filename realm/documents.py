"""Documents read from JSONL, and every way in which a file of them can be wrong."""

import gzip
import io
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from realm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class Document(NamedTuple):
    """One record of the input; `text` is not changed in any way."""

    id: str
    title: str
    text: str


@dataclass
class BadRecords:
    """The records of one file that cannot be used: the first twenty with line and reason, all of them counted by kind."""

    path: Path
    first: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, line: int, kind: str, detail: str = "") -> None:
        if len(self.first) < 20:
            self.first.append(f"{self.path}:{line}: {kind}{detail}")
        self.counts[kind] += 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        records = "record" if self.total == 1 else "records"
        lines = [f"{self.total} {records} of {self.path} cannot be used:", *("  " + line for line in self.first)]
        if (more := self.total - len(self.first)) > 0:
            lines.append(f"  … and {more} more; in all " + ", ".join(f"{n} x {kind}" for kind, n in self.counts.most_common()))
        return "\n".join(lines)


class _BadRecord(Exception):
    """Why a line is not a document: kind and detail."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind + detail)
        self.kind, self.detail = kind, detail


def read_documents(path: Path, skip_bad: bool = False, report: BadRecords | None = None) -> Iterator[Document]:
    """Yields the documents of a JSONL file (plain, .gz or .zst) in its order, one of each id.

    `id` (text, or a whole number, kept as its digits) and `text` are required, `title` is "" where missing or null, other fields
    are ignored, as are blank lines. Records that cannot be used (no UTF-8, no JSON object, a field missing or of the wrong type, no
    visible character, an id seen before or confusable with the number of a block, the rest of a truncated file) are noted in `report`.

    Raises UserError at once where the file cannot be read, and, *after the last line*, the whole report unless `skip_bad`: who must
    not act on half a corpus reads to the end first. The ids are held in memory.
    """
    report = BadRecords(path) if report is None else report
    seen = _Ids()
    num_lines = 0
    for num_lines, line in enumerate(_lines(path, report), 1):
        if not line.strip():
            continue
        try:
            document = _parse(line)
            seen.add(document.id, num_lines)
        except _BadRecord as bad:
            report.add(num_lines, bad.kind, bad.detail)
        else:
            yield document
    if report.total and not skip_bad:
        raise UserError(f"{report}\nMend them, or leave them out with --skip-bad.")
    if not seen.line_of:
        raise UserError(f"{path} holds no document" + (f" that can be used\n{report}" if report.total else ""))


class _Ids:
    """Ids seen so far. `a#0` beside `a` is refused: blocks of the document `a` bear such ids."""

    def __init__(self) -> None:
        self.line_of: dict[str, int] = {}
        self._numbered: dict[str, int] = {}

    def add(self, document_id: str, line: int) -> None:
        if (first := self.line_of.get(document_id)) is not None:
            raise _BadRecord("duplicate id", f" {document_id!r}, first on line {first}")
        base, separator, number = document_id.rpartition("#")
        is_numbered = bool(separator) and number.isdecimal()
        other = self.line_of.get(base) if is_numbered else self._numbered.get(document_id)
        if other is not None:
            raise _BadRecord("id confusable with a block", f" {document_id!r}: blocks of a document A are named A#0, A#1; see line {other}")
        self.line_of[document_id] = line
        if is_numbered:
            self._numbered.setdefault(base, line)


def check_readable(path: Path) -> None:
    """Raises UserError, in one sentence, where `path` is no file of documents that can be opened."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file ending in {', '.join(SUFFIXES)}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, so that its format is known")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty; it must hold one JSON object a line")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _lines(path: Path, report: BadRecords) -> Iterator[bytes]:
    """The lines of the decompressed file; a file that breaks off is noted in `report` and ends there."""
    check_readable(path)
    with path.open("rb") as raw, _decompressed(raw, path) as stream:
        for number in count(1):
            try:
                line = stream.readline()
            except (EOFError, zlib.error, OSError) as error:
                report.add(number, "broken compressed data", f" ({error}); nothing from here on can be read")
                return
            if not line:
                return
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.endswith(".zst"):
        # zstandard's own reader takes a truncated file for a complete one; Arrow's does not.
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 16)
    return raw


def _parse(line: bytes) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _BadRecord("broken JSON", f" ({error})") from None
    if not isinstance(record, dict):
        raise _BadRecord("not a JSON object", f" but {_json_type(record)}")
    document_id = record.get("id")
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        record["id"] = document_id = str(document_id)
    for name in ("id", "title", "text"):
        value = record.get(name)
        if name == "title" and value is None:
            continue
        if name not in record:
            raise _BadRecord(f'no field "{name}"', f"; the record has {', '.join(sorted(record)) or 'no fields'}")
        if not isinstance(value, str):
            raise _BadRecord(f'"{name}" is not text', f" but {_json_type(value)}")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise _BadRecord("half of a surrogate pair", f' in "{name}"')
    if not record["id"]:
        raise _BadRecord('empty "id"')
    if not any(map(_is_visible, record["text"])):
        raise _BadRecord('empty "text"')
    return Document(record["id"], record.get("title") or "", record["text"])


def _is_visible(character: str) -> bool:
    """Letter, digit, punctuation or symbol: a tokenizer drops white space, control characters and lone accents."""
    return unicodedata.category(character)[0] in "LNPS" and character != "\ufffd"


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
