"""Sections of a configuration that check their own values."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, TypeAlias

from realm.errors import UserError

PATH = "path"
PathText: TypeAlias = Annotated[str, PATH]
"""Type of a field that may be a path: `~` is expanded when it is read from YAML."""

MAX_INT = 2**31 - 1
"""Largest whole number in a config: C libraries take no larger ones."""

MAX_PROCESSES = 1024
"""Most threads or processes that a config may ask for."""


class InvalidSection(UserError):
    """Invalid values; `problems` has a clause per value."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"{'; '.join(problems)}.")
        self.problems = problems


class Section:
    """Base class of config sections, which are frozen dataclasses."""

    def problems(self) -> Iterator[str]:
        """Yield one sentence per invalid value, without a full stop: field name, rule, value.

        That numbers are finite and at most `MAX_INT` is checked for all fields in `all_problems`.
        """
        return iter(())

    def at_least(self, least: float, *names: str) -> Iterator[str]:
        """Problems of the fields `names` that are smaller than `least`; None is valid."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} must be at least {least}, got {value}"

    def at_most(self, most: float, *names: str) -> Iterator[str]:
        """Problems of the fields `names` that are larger than `most`; None is valid."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value > most:
                yield f"{name} must be at most {most:,}, got {value}"

    def positive(self, *names: str) -> Iterator[str]:
        """Problems of the fields `names` that are not greater than 0."""
        for name in names:
            if getattr(self, name) <= 0:
                yield f"{name} must be greater than 0, got {getattr(self, name)}"

    def probabilities(self, *names: str) -> Iterator[str]:
        """Problems of the fields `names` that are not between 0 and 1."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                yield f"{name} must be between 0 and 1, got {value}"

    def below_one(self, *names: str) -> Iterator[str]:
        """Problems of the fields `names`, or of the values in them, that are not in [0, 1)."""
        for name in names:
            value = getattr(self, name)
            if not all(0 <= part < 1 for part in (value if isinstance(value, tuple) else (value,))):
                yield f"{name} must be at least 0 and less than 1, got {value}"


def all_problems(section: object, prefix: str = "") -> Iterator[str]:
    """Problems of a section and of the sections inside it, each with the full name of its field."""
    values = {f"{prefix}{entry.name}": getattr(section, entry.name) for entry in fields(section)}  # type: ignore[arg-type]
    unusable = [problem for name, value in values.items() for problem in _unusable_numbers(name, value)]
    yield from unusable
    if isinstance(section, Section) and not unusable:
        yield from (f"{prefix}{problem}" for problem in section.problems())
    for name, value in values.items():
        parts = {f"{name}[{n}]": part for n, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
        for part_name, part in parts.items():
            if is_dataclass(part):
                yield from all_problems(part, f"{part_name}.")


def _unusable_numbers(name: str, value: object) -> Iterator[str]:
    """Problems of numbers that no field accepts; `value` is a number, a tuple or anything else."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            yield f"{name} must be a finite number, got {number}"
        if isinstance(number, int) and abs(number) > MAX_INT:
            yield f"{name} must be at most {MAX_INT:,}, got a number of {len(str(abs(number)))} digits"
