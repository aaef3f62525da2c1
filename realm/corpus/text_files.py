"""Text files as people have them, plain or compressed: lines with their places, whole JSON
files, and a report of what cannot be used."""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from realm.errors import UserError

T = TypeVar("T")

COMPRESSED = ("", ".gz", ".zst")
"""Suffixes behind a format's own."""


class Place(NamedTuple):
    """Where a record stands."""

    file: str
    line: int | None = None
    """Line counted from 1; none where the file is the record. Of tables, the row."""

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def seen_from(self, other: "Place") -> str:
        """The place as one says it in a report about `other`."""
        return f"on line {self.line}" if self.file == other.file and self.line is not None else f"at {self}"


@dataclass
class BadRecords:
    """The records that cannot be used: the first twenty with place and reason, all of them
    counted by kind."""

    no_mistakes: tuple[str, ...] = ()
    """Kinds that are left out as their authors meant it: counted in `left_out`, and neither
    listed nor part of the total."""
    left_out: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, place: Place, kind: str, detail: str = "") -> None:
        if kind in self.no_mistakes:
            self.left_out[kind] += 1
            return
        if len(self.first) < 20:
            self.first.append(f"{place}: {kind}{detail}")
        self.counts[kind] += 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        lines = [
            f"{self.total} {'record' if self.total == 1 else 'records'} cannot be used:",
            *("  " + line for line in self.first),
        ]
        if (more := self.total - len(self.first)) > 0:
            lines.append(
                f"  … and {more} more; in all " + ", ".join(f"{n} x {kind}" for kind, n in self.counts.most_common())
            )
        return "\n".join(lines)


class BadRecord(Exception):
    """Why a record cannot be used: kind and detail."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind + detail)
        self.kind, self.detail = kind, detail


def stem(path: Path) -> tuple[str, str]:
    """Name without the suffixes of format and compression, and the format's suffix: `a.jsonl.gz`
    is `a`, `.jsonl`."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED[1:] else path
    return plain.stem, plain.suffix.lower()


def named_format(name: str, formats: Collection[str], path: str) -> str | None:
    """The format a source names, or None where it leaves it to be told (`auto`). Raises
    UserError for one that there is not."""
    if name == "auto":
        return None
    if name not in formats:
        raise UserError(f"unknown format {name!r} of {path}; choose one of {', '.join(formats)}")
    return name


def parsed_lines(path: Path, holds: str, report: BadRecords, parse: Callable[[Place, bytes], T]) -> Iterator[T]:
    """`parse(place, line)` of every line of a file that `holds` something; lines for which it
    raises BadRecord are noted in `report`."""
    check_file(path, holds)
    for place, line in lines(path, report.add):
        try:
            yield parse(place, line)
        except BadRecord as bad:
            report.add(place, bad.kind, bad.detail)


def check_file(path: Path, holds: str) -> None:
    """Raises UserError, in one sentence, where `path` is no file with content that can be
    opened; `holds` says what should be in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file that holds {holds}")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty; it must hold {holds}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def lines(path: Path, broken: Callable[[Place, str, str], object]) -> Iterator[tuple[Place, bytes]]:
    """The lines that are not blank of the decompressed file, byte order mark gone; where the
    compressed data breaks off, `broken` is told and the file ends."""
    with path.open("rb") as raw, _decompressed(raw, path) as stream:
        for number in count(1):
            place = Place(str(path), number)
            try:
                line = stream.readline()
            except (EOFError, zlib.error, OSError) as error:
                broken(place, "broken compressed data", f" ({error}); nothing from here on can be read")
                return
            if not line:
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield place, line


def read_names(path: Path) -> list[str]:
    """The lines of a text file, without the white space at their ends. Raises UserError where
    there is none, or one is no UTF-8."""
    report = BadRecords()
    names = list(
        parsed_lines(path, "one name a line", report, lambda place, line: line.decode("utf-8", "replace").strip())
    )
    if report.total:
        raise UserError(str(report))
    broken = next((number for number, name in enumerate(names, 1) if "\ufffd" in name), None)
    if broken is not None:
        raise UserError(f"{path}: name {broken} is not UTF-8; save the file as UTF-8.")
    return names


def read_json(path: Path, holds: str) -> Any:
    """The value of a JSON file, plain or compressed. Raises UserError naming the file and what
    is wrong with it."""
    check_file(path, holds)
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            return json.loads(stream.read().decode("utf-8-sig"))
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is broken off or not compressed as its name says ({error})") from error
    except (ValueError, RecursionError) as error:
        remedy = (
            "name its format, jsonl, if it has one object a line"
            if "Extra data" in str(error)
            else f"it must hold {holds}"
        )
        raise UserError(f"{path} is no JSON ({error}); {remedy}") from error


def detect_by_key(path: Path, holds: str, formats: Mapping[str, str]) -> str | None:
    """The format whose key stands in a JSON file's object, or in the first of its list;
    `formats` names the key of each."""
    content = read_json(path, holds)
    first = content[0] if isinstance(content, list) and content else content
    return next((name for name, key in formats.items() if isinstance(first, dict) and key in first), None)


def read_text(path: Path) -> str:
    """A text file, plain or compressed, byte order mark gone. Raises UnicodeDecodeError, and
    UserError where it cannot be read."""
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            content = stream.read()
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read, or is not compressed as its name says ({error})") from error
    return content.decode("utf-8-sig")


def check_text(text: str, where: str = "") -> None:
    """Raises BadRecord for text that no encoding can write; `where` says where it stands."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRecord("half of a surrogate pair", where)


def json_type(value: object) -> str:
    """A value's type as a person says it."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.endswith(".zst"):
        # zstandard's own reader takes a truncated file for a complete one; Arrow's does not.
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 16)
    return raw


def parse_object(line: bytes) -> dict[str, Any]:
    """A line of JSONL. Raises BadRecord."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("broken JSON", f" ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object", f" but {json_type(record)}")
    return record


def parse_tsv(line: bytes) -> list[str]:
    """The fields of a tab-separated line with CSV quoting, as DPR's files have it. Raises
    BadRecord, also for a quote that is not closed."""
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
