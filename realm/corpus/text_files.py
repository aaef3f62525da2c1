"""Plain and compressed text and JSON files."""

import csv
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from realm.corpus.records import BadRecord, BadRecords, Place, json_type
from realm.errors import UserError, first_line, shortened

T = TypeVar("T")

COMPRESSED = ("", ".gz", ".zst")
"""Compression suffixes, which follow the suffix of the format."""


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
        with report.skipping(place):
            yield parse(place, line)


def check_file(path: Path, expected: str) -> None:
    """Raise UserError if `path` is not a readable, non-empty file.

    `expected` describes the content in the message: "{path} is empty; expected {expected}".
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file with {expected}.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a pipe or device, which cannot be read twice; give a file with {expected}.")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty; expected {expected}.")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path.

    Links to folders are followed, and a folder that is reached in several ways is read once. A link
    to nothing is included, so that reading it fails; pipes and devices are not. Raises UserError if
    a folder cannot be read.
    """
    files: list[Path] = []
    folders: list[Path] = [folder]
    links: list[Path] = []
    seen: set[tuple[int, int]] = set()
    while folders or links:  # all real folders first, so that files are found under their real path
        current = folders.pop() if folders else links.pop(0)
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(Path(entry) for entry in os.scandir(current))
        except OSError as error:
            raise UserError(f"the folder {current} cannot be read: {error.strerror}.") from error
        for entry in entries:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry)
            elif entry.is_file() or not entry.exists():
                files.append(entry)
    return sorted(files)


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
                on_error(place, "corrupt compressed data", f" ({first_line(error)}); the rest of the file is not read")
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
            return _DECODER.decode(stream.read().decode("utf-8-sig"))
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"{path} is truncated, or is not compressed as its suffix indicates ({first_line(error)})."
        ) from error
    except DuplicateKey as error:
        raise UserError(f"{path} has an object with {error}; remove one of the values.") from None
    except (ValueError, RecursionError) as error:
        remedy = (
            "set `format: jsonl` if it has one object per line"
            if "Extra data" in str(error)
            else f"expected {expected}"
        )
        raise UserError(f"{path} is not valid JSON ({first_line(error)}); {remedy}.") from error


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
        raise UserError(
            f"{path} cannot be read, or is not compressed as its suffix indicates ({first_line(error)})."
        ) from error
    return content.decode("utf-8-sig")


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.endswith(".zst"):
        # zstandard's own reader does not detect truncated files; Arrow's does.
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 16)
    return raw


class DuplicateKey(ValueError):
    """A JSON object has two values for a key, of which Python would silently use the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKey(f"two values for {shortened(twice)!r}")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line of JSONL. Raises BadRecord if it is not a JSON object, or has a key twice."""
    try:
        record = _DECODER.decode(decoded(line))
    except DuplicateKey as error:
        raise BadRecord("duplicate key", f": {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("invalid JSON", f" ({first_line(error)})") from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object", f" but {json_type(record)}")
    return record


def decoded(line: bytes) -> str:
    """The line as text. Raises BadRecord if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f", byte {error.start + 1} of the line") from None


def parse_tsv(line: bytes) -> list[str]:
    """Parse a tab-separated line with CSV quoting, as in DPR's files.

    Raises BadRecord if it is not UTF-8 or its quoting is invalid.
    """
    text = decoded(line).rstrip("\r\n")
    if '"' not in text:
        return text.split("\t")
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        return next(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error as error:
        raise BadRecord("invalid quoting", f" ({first_line(error)})") from None
