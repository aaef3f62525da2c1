"""Versions of encoders and indexes, and the lineage of the training attempts that wrote them."""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import total_ordering
from pathlib import Path

from realm.runtime.publish import PublishError, write_json_atomic

_VERSION = re.compile(r"a([0-9]{2,})-step-([0-9]{6,})(?:-e([0-9]+))?")


@total_ordering
@dataclass(frozen=True)
class Version:
    """`a01-step-000500` is an encoder exported by attempt 1 at step 500, `a01-step-000500-e3` the
    index built from it under epoch 3.

    Ordered by attempt, step, epoch; an encoder stands before its indexes.
    """

    attempt: int
    step: int
    epoch: int | None = None

    @property
    def name(self) -> str:
        return f"a{self.attempt:02d}-step-{self.step:06d}" + ("" if self.epoch is None else f"-e{self.epoch}")

    @classmethod
    def parse(cls, name: str) -> "Version":
        """Inverse of `name`; PublishError for any other text."""
        match = _VERSION.fullmatch(name)
        version = match and cls(int(match[1]), int(match[2]), None if match[3] is None else int(match[3]))
        if not version or version.name != name:
            raise PublishError(f"{name!r} is not the name of a version, such as a01-step-000500 or a01-step-000500-e3")
        return version

    @property
    def encoder(self) -> "Version":
        """The encoder this index was built from."""
        return Version(self.attempt, self.step)

    def with_epoch(self, epoch: int) -> "Version":
        return Version(self.attempt, self.step, epoch)

    def __lt__(self, other: "Version") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int, int]:
        return (self.attempt, self.step, -1 if self.epoch is None else self.epoch)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Attempt:
    """One run of the trainer: it continues `parent` from `parent_step`, or starts from nothing
    (both None)."""

    attempt: int
    parent: int | None = None
    parent_step: int | None = None


@dataclass(frozen=True)
class Lineage:
    """Which attempt continued which, and from which step: `lineage.json` of a run folder."""

    attempts: tuple[Attempt, ...] = ()

    @classmethod
    def load(cls, run: Path) -> "Lineage":
        """Read `run/lineage.json`; without one the lineage is empty: no attempt has begun."""
        path = run / "lineage.json"
        try:
            return cls(tuple(Attempt(**attempt) for attempt in json.loads(path.read_bytes())))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise PublishError(
                f"{path} is not a list of attempts ({error}); restore it from a copy of the run"
            ) from None

    @property
    def current(self) -> int | None:
        """The attempt that began last, or None before the first."""
        return self.attempts[-1].attempt if self.attempts else None

    def limits(self, attempt: int) -> dict[int, float]:
        """Last step that counts, for `attempt` (infinity) and each of its ancestors; all other
        attempts are abandoned futures."""
        by_number = {entry.attempt: entry for entry in self.attempts}
        entry, limit = by_number[attempt], float("inf")
        limits = {attempt: limit}
        while entry.parent is not None and entry.parent_step is not None:
            limit = min(limit, entry.parent_step)
            limits[entry.parent] = limit
            entry = by_number[entry.parent]
        return limits

    def allows(self, version: Version, attempt: int) -> bool:
        """Whether `version` comes from `attempt` itself or from an ancestor, not later than the
        step where the way to `attempt` left it."""
        return version.step <= self.limits(attempt).get(version.attempt, -1)


def start_attempt(run: Path, parent: int | None = None, parent_step: int | None = None) -> int:
    """Record a new attempt in `run/lineage.json` and return its number. Only the run's one trainer
    may call it.

    `parent` and `parent_step`: the attempt that wrote the checkpoint resumed from, and that
    checkpoint's step; both None for a new run.
    """
    attempts = Lineage.load(run).attempts
    assert (parent is None) == (parent_step is None)
    if parent is not None and parent not in {entry.attempt for entry in attempts}:
        raise PublishError(
            f"{run / 'lineage.json'} knows no attempt {parent} to resume from; restore it from a copy of the run"
        )
    attempt = Attempt(len(attempts) + 1, parent, parent_step)
    write_json_atomic(run / "lineage.json", [asdict(entry) for entry in (*attempts, attempt)])
    return attempt.attempt


def versions_in(folder: Path) -> list[Version]:
    """All versions published in `folder`, of whatever lineage, oldest first; other names are
    passed over. Empty without the folder."""
    versions = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        with suppress(PublishError):
            versions.append(Version.parse(entry.name))
    return sorted(versions)


def newest(folder: Path, lineage: Lineage, attempt: int) -> list[Version]:
    """The versions in `folder` that `attempt` may use, newest first: by step, then attempt, then
    epoch."""
    return [version for version in reversed(versions_in(folder)) if lineage.allows(version, attempt)]
