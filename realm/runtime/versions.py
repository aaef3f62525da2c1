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
    """Version of an encoder or of an index built from it.

    `a01-step-000500` is the encoder that attempt 1 exported at step 500, `a01-step-000500-e3` the
    index built from it under lease epoch 3. Versions are ordered by attempt, step and epoch; an
    encoder sorts before its indexes.
    """

    attempt: int
    step: int
    epoch: int | None = None

    @property
    def name(self) -> str:
        return f"a{self.attempt:02d}-step-{self.step:06d}" + ("" if self.epoch is None else f"-e{self.epoch}")

    @classmethod
    def parse(cls, name: str) -> "Version":
        """Parse a `name`. Raises PublishError if `name` is not a version name."""
        match = _VERSION.fullmatch(name)
        version = match and cls(int(match[1]), int(match[2]), None if match[3] is None else int(match[3]))
        if not version or version.name != name:
            raise PublishError(f"{name!r} is not a version name such as a01-step-000500 or a01-step-000500-e3")
        return version

    @property
    def encoder(self) -> "Version":
        """Version of the encoder that this index was built from."""
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
    """One start of the trainer: a new run, or a resume of `parent` at `parent_step`.

    Both are None for a new run.
    """

    attempt: int
    parent: int | None = None
    parent_step: int | None = None

    def check(self, number: int) -> None:
        """Raise ValueError unless this is a valid entry number `number`, from 1, of a lineage."""
        resumed = self.parent in range(1, number) and isinstance(self.parent_step, int) and self.parent_step >= 0
        if self.attempt != number or not (resumed or (self.parent, self.parent_step) == (None, None)):
            raise ValueError(f"entry {number} is {self}")


@dataclass(frozen=True)
class Lineage:
    """The attempts of a run and the steps they resumed from: `lineage.json` of a run folder."""

    attempts: tuple[Attempt, ...] = ()

    @classmethod
    def load(cls, run: Path) -> "Lineage":
        """Read `run/lineage.json`. The lineage is empty if nothing has been exported yet.

        Raises PublishError if the file is corrupt, or missing although there are exports.
        """
        path = run / "lineage.json"
        try:
            lineage = cls(tuple(Attempt(**attempt) for attempt in json.loads(path.read_bytes())))
            for number, entry in enumerate(lineage.attempts, 1):
                entry.check(number)
        except FileNotFoundError:
            if versions_in(run / "encoders"):
                raise PublishError(
                    f"{path} is missing, so the versions in {run} cannot be used; restore it from a backup of the run"
                ) from None
            return cls()
        except (ValueError, TypeError, IsADirectoryError) as error:
            raise PublishError(
                f"{path} is not a valid list of attempts ({error}); restore it from a backup of the run"
            ) from None
        return lineage

    @property
    def current(self) -> int | None:
        """Number of the latest attempt, or None before the first."""
        return self.attempts[-1].attempt if self.attempts else None

    def limits(self, attempt: int) -> dict[int, float]:
        """Last valid step of `attempt` (infinity) and of each of its ancestors.

        Later steps and all other attempts were abandoned by a resume.
        """
        by_number = {entry.attempt: entry for entry in self.attempts}
        entry, limit = by_number[attempt], float("inf")
        limits = {attempt: limit}
        while entry.parent is not None and entry.parent_step is not None:
            limit = min(limit, entry.parent_step)
            limits[entry.parent] = limit
            entry = by_number[entry.parent]
        return limits

    def allows(self, version: Version, attempt: int) -> bool:
        """Whether `attempt` may use `version`.

        It may if the version comes from `attempt` or from an ancestor, not later than the step at
        which the next attempt resumed.
        """
        return version.step <= self.limits(attempt).get(version.attempt, -1)


def start_attempt(run: Path, parent: int | None = None, parent_step: int | None = None) -> int:
    """Record a new attempt in `run/lineage.json` and return its number.

    `parent` and `parent_step` are the attempt that wrote the checkpoint to resume from and the
    checkpoint's step; both are None for a new run. Only the trainer of the run may call this
    function. Raises PublishError if the lineage does not contain `parent`.
    """
    attempts = Lineage.load(run).attempts
    assert (parent is None) == (parent_step is None)
    if parent is not None and parent not in {entry.attempt for entry in attempts}:
        raise PublishError(
            f"{run / 'lineage.json'} contains no attempt {parent} to resume from; restore it from a backup of the run"
        )
    attempt = Attempt(len(attempts) + 1, parent, parent_step)
    write_json_atomic(run / "lineage.json", [asdict(entry) for entry in (*attempts, attempt)])
    return attempt.attempt


def versions_in(folder: Path) -> list[Version]:
    """All versions in `folder`, of any lineage, oldest first.

    Files and folders with other names are skipped. The result is empty if the folder does not
    exist.
    """
    versions = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        with suppress(PublishError):
            versions.append(Version.parse(entry.name))
    return sorted(versions)


def newest(folder: Path, lineage: Lineage, attempt: int) -> list[Version]:
    """The versions in `folder` that `attempt` may use, newest first."""
    return [version for version in reversed(versions_in(folder)) if lineage.allows(version, attempt)]
