"""Sections of a configuration that check their own values."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass


class Section:
    """Base class of config sections, which are frozen dataclasses."""

    def problems(self) -> Iterator[str]:
        """Yield one sentence per invalid value, without a full stop: field name, rule, value."""
        return iter(())

    def at_least(self, least: float, *names: str) -> Iterator[str]:
        """Problems of the fields `names` that are smaller than `least`; None is valid."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                yield f"{name} must be at least {least}, got {value}"

    def probabilities(self, *names: str) -> Iterator[str]:
        """Problems of the fields `names` that are not between 0 and 1."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                yield f"{name} must be between 0 and 1, got {value}"

    def finite(self, *names: str) -> Iterator[str]:
        """Problems of the fields `names` that are negative, infinite or NaN; None is valid."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                yield f"{name} must be a finite number of at least 0, got {value}"


def all_problems(section: object, prefix: str = "") -> Iterator[str]:
    """Problems of a section and of the sections inside it, each with the full name of its field."""
    if isinstance(section, Section):
        yield from (f"{prefix}{problem}" for problem in section.problems())
    if is_dataclass(section):
        for entry in fields(section):
            yield from all_problems(getattr(section, entry.name), f"{prefix}{entry.name}.")
