"""Records of input files: their positions, the checks of their values, and a report of those that
cannot be used."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from realm.errors import shortened

T = TypeVar("T")


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
            self.first.append(shortened(f"{place}: {kind}{detail}", 400))
        self.counts[kind] += 1

    @contextmanager
    def skipping(self, place: Place) -> Iterator[None]:
        """Add the record at `place` if the block raises BadRecord."""
        try:
            yield
        except BadRecord as bad:
            self.add(place, bad.kind, bad.detail)

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


def check_text(text: str, where: str = "") -> None:
    """Raise BadRecord if `text` contains a lone surrogate, which cannot be encoded as UTF-8.

    `where` is appended to the message.
    """
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRecord("unpaired surrogate", where)


_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def json_type(value: object) -> str:
    """Name of a JSON value's type for messages."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def expect(record: object, kind: type[T], what: str) -> T:
    """Return a JSON value of type `kind`. Raises BadRecord naming `what` if it has another type."""
    if type(record) is not kind:
        raise BadRecord(f"{what} is not {_TYPE_NAMES[kind]}", f" but {json_type(record)}")
    return record


def expect_field(record: object, name: str, kind: type[T], owner: str) -> T:
    """Return the field `name` of a JSON object, which must have the type `kind`.

    Raises BadRecord if `record`, described as `owner`, is not an object or has no such field, or if
    its value has another type.
    """
    fields = expect(record, dict, owner)
    if name not in fields:
        raise missing_field(name, fields)
    return expect(fields[name], kind, f'"{name}"')


def missing_field(name: str, record: Mapping[str, object], how: str = "") -> BadRecord:
    """The error for a record without the field `name`; `how` explains where the name is from."""
    present = shortened(", ".join(sorted(map(str, record)))) or "no fields"
    return BadRecord(f'missing field "{name}"{how}', f"; the record has {present}")
