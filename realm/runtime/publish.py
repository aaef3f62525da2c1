"""What two processes that meet only in the file system need: atomic publishing, versions, their
lineage.

A published directory never changes: it is written under a temporary name beside its place, flushed
to disk and renamed. Temporary names begin with `.tmp-`; whatever a crash leaves behind carries that
name.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import total_ordering
from pathlib import Path
from typing import IO, Any

from realm.errors import UserError

TEMPORARY = ".tmp-"
"""Prefix of every name that is not published yet."""

MANIFEST = "manifest.json"

_VERSION = re.compile(r"a([0-9]{2,})-step-([0-9]{6,})(?:-e([0-9]+))?")


class PublishError(UserError):
    """A published directory is missing, broken, or in the way."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Yield an empty directory beside `final` that becomes `final`, all at once, when the block
    ends.

    If the block raises, nothing is left. Raises PublishError where `final` exists: published
    directories never change.
    """
    if final.exists():
        raise PublishError(
            f"{final} exists already and published folders never change; remove it or choose another name"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{TEMPORARY}{final.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for file in files:
                _sync(Path(folder, file))
            _sync(Path(folder))
        try:
            temporary.rename(final)
        except OSError as error:
            if final.exists():
                raise PublishError(f"{final} was published by another process meanwhile; its copy is kept") from error
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(final.parent)


def write_file_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write(file)` fill a temporary file beside `path`, then put it in the place of `path`:
    a reader sees the old or the new."""
    temporary = path.parent / f"{TEMPORARY}{path.name}-{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    write_file_atomic(path, lambda file: file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode()))


def checksum(path: Path) -> str:
    """SHA-256 of a file; of a folder: over the names and checksums of all files in it, in the
    order of their names."""
    if path.is_dir():
        files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(f"{checksum(file)}  {name}\n" for name, file in files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`, the last file of `folder`, adding size and checksum of all other
    files and a checksum of itself."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {**manifest, "files": files}
    write_json_atomic(folder / MANIFEST, {**manifest, "manifest_sha256": _self_checksum(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what `write_manifest` wrote, `files` included. PublishError where it is missing, no
    JSON, or altered."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PublishError(
            f"{path} is missing: {folder.name} was not published by this program, or only copied in part"
        ) from None
    except ValueError as error:
        raise PublishError(f"{path} is not valid JSON ({error}); publish it again") from None
    if not isinstance(manifest, dict) or manifest.pop("manifest_sha256", None) != _self_checksum(manifest):
        raise PublishError(f"{path} was altered after it was published; publish it again")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file named in the manifest with its size, then its checksum. PublishError
    names the first that differs."""
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise PublishError(f"{path} is missing; publish it again")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise PublishError(
                f"{path} has {size} bytes where its manifest promises {expected['bytes']}; publish it again"
            )
    for name, expected in manifest["files"].items():
        if checksum(folder / name) != expected["sha256"]:
            raise PublishError(f"{folder / name} does not match the checksum in its manifest; publish it again")


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
