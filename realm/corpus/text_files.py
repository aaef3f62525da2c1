"""Plain and compressed text and JSON files, and a report of records that cannot be used."""

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
"""Compression suffixes, which follow the suffix of the format."""


class Place(NamedTuple):
    """Position of a record: its file and line."""

    file: str
    line: int | None = None
    """Line number (of tables: row number), starting at 1; None if the whole file is the record."""

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def relative_to(self, other: "Place") -> str:
        """Describe this position in a message about `other`: without the file if it is the same."""
        return f"on line {self.line}" if self.file == other.file and self.line is not None else f"at {self}"


@dataclass
class BadRecords:
    """Report of records that cannot be used: counts by kind, and the first 20 in detail."""

    expected_kinds: tuple[str, ...] = ()
    """Kinds that are not errors: counted in `expected`, not listed and not part of the total."""
    expected: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, place: Place, kind: str, detail: str = "") -> None:
        if kind in self.expected_kinds:
            self.expected[kind] += 1
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
                f"  … and {more} more; by kind: " + ", ".join(f"{n} x {kind}" for kind, n in self.counts.most_common())
            )
        return "\n".join(lines)


class BadRecord(Exception):
    """A record that cannot be used; `kind` and `detail` form the message."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind + detail)
        self.kind, self.detail = kind, detail


def stem(path: Path) -> tuple[str, str]:
    """Stem and format suffix of a path, without compression: `a.jsonl.gz` → `a`, `.jsonl`."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED[1:] else path
    return plain.stem, plain.suffix.lower()


def named_format(name: str, formats: Collection[str], path: str) -> str | None:
    """Return the format `name`, or None if it is to be auto-detected (`auto`).

    Raises UserError if `name` is not one of `formats`.
    """
    if name == "auto":
        return None
    if name not in formats:
        raise UserError(f"unknown format {name!r} of {path}; choose one of {', '.join(formats)}.")
    return name


def parsed_lines(path: Path, expected: str, report: BadRecords, parse: Callable[[Place, bytes], T]) -> Iterator[T]:
    """Yield `parse(place, line)` for every line of a file.

    Lines for which `parse` raises BadRecord are added to `report`. `expected` describes the content
    of the file, see `check_file`.
    """
    check_file(path, expected)
    for place, line in lines(path, report.add):
        try:
            yield parse(place, line)
        except BadRecord as bad:
            report.add(place, bad.kind, bad.detail)


def check_file(path: Path, expected: str) -> None:
    """Raise UserError if `path` is not a readable, non-empty file.

    `expected` describes the content in the message: "{path} is empty; expected {expected}".
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file with {expected}.")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty; expected {expected}.")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def lines(path: Path, on_error: Callable[[Place, str, str], object]) -> Iterator[tuple[Place, bytes]]:
    """Yield the non-blank lines of the decompressed file, without a byte order mark.

    If the compressed data is corrupt or truncated, `on_error(place, kind, detail)` is called and
    the iteration ends.
    """
    with path.open("rb") as raw, _decompressed(raw, path) as stream:
        for number in count(1):
            place = Place(str(path), number)
            try:
                line = stream.readline()
            except (EOFError, zlib.error, OSError) as error:
                on_error(place, "corrupt compressed data", f" ({error}); the rest of the file is not read")
                return
            if not line:
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield place, line


def read_names(path: Path) -> list[str]:
    """Read the non-blank lines of a text file, stripped of white space.

    Raises UserError if the file cannot be read, is empty, or is not UTF-8.
    """
    report = BadRecords()
    names = list(
        parsed_lines(path, "one name per line", report, lambda place, line: line.decode("utf-8", "replace").strip())
    )
    if report.total:
        raise UserError(str(report))
    broken = next((number for number, name in enumerate(names, 1) if "\ufffd" in name), None)
    if broken is not None:
        raise UserError(f"{path}: name {broken} is not valid UTF-8; save the file as UTF-8.")
    return names


def read_json(path: Path, expected: str) -> Any:
    """Load a plain or compressed JSON file; `expected` describes its content, see `check_file`.

    Raises UserError naming the file and the problem if it cannot be loaded.
    """
    check_file(path, expected)
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            return json.loads(stream.read().decode("utf-8-sig"))
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is truncated, or is not compressed as its suffix indicates ({error}).") from error
    except (ValueError, RecursionError) as error:
        remedy = (
            "set `format: jsonl` if it has one object per line"
            if "Extra data" in str(error)
            else f"expected {expected}"
        )
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}.") from error


def detect_by_key(path: Path, expected: str, formats: Mapping[str, str]) -> str | None:
    """Auto-detect the format of a JSON file by a key of its object, or of the first in its list.

    `formats` maps formats to keys. Returns None if no key is present.
    """
    content = read_json(path, expected)
    first = content[0] if isinstance(content, list) and content else content
    return next((name for name, key in formats.items() if isinstance(first, dict) and key in first), None)


def read_text(path: Path) -> str:
    """Read a plain or compressed text file, without a byte order mark.

    Raises UnicodeDecodeError if it is not UTF-8, UserError if it cannot be read.
    """
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            content = stream.read()
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read, or is not compressed as its suffix indicates ({error}).") from error
    return content.decode("utf-8-sig")


def check_text(text: str, where: str = "") -> None:
    """Raise BadRecord if `text` contains a lone surrogate, which cannot be encoded as UTF-8.

    `where` is appended to the message.
    """
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRecord("unpaired surrogate", where)


def json_type(value: object) -> str:
    """Name of a JSON value's type for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.endswith(".zst"):
        # zstandard's own reader does not detect truncated files; Arrow's does.
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 16)
    return raw


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line of JSONL. Raises BadRecord if it is not a JSON object."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("invalid JSON", f" ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object", f" but {json_type(record)}")
    return record


def parse_tsv(line: bytes) -> list[str]:
    """Parse a tab-separated line with CSV quoting, as in DPR's files.

    Raises BadRecord if it is not UTF-8 or its quoting is invalid.
    """
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
        raise BadRecord("invalid quoting", f" ({error})") from None
