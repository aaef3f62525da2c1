"""Retention of index versions: which versions are needed, and garbage collection of the others.

In addition to the newest versions, two kinds are kept. A version is *pinned* by a process that has
it open: a `VersionPin`, a file under `refresher/holds/`. A version is *referenced* by a checkpoint
that needs it to resume: the checkpoint names it in its file `index_version`. Of the exported
encoders, those that a checkpoint's version or a later one was or would be built from are kept.

A process that opens a version creates a pin and then checks that the version still exists. The
collector renames a version, then looks for reasons to keep it once more, and renames it back if
there is one. Whichever acts second sees the action of the other, so no version disappears after a
process has pinned and checked it.
"""

import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from index.replay import requested_exports
from realm.runtime.publish import TEMPORARY, PublishError
from realm.runtime.versions import Lineage, Version, newest, versions_in

_PIN = re.compile(r"(?P<host>.+)\.(?P<pid>[0-9]+)\.[0-9a-f]{32}")
FROZEN = "frozen"
"""Folder of a run with the stores of frozen indexes, one per retriever."""
ASIDE = f"{TEMPORARY}aside-"
"""Name prefix of an index version while the collector looks for reasons to keep it once more."""


def process_name() -> str:
    """`host.pid` of this process."""
    return f"{socket.gethostname()}.{os.getpid()}"


class VersionPin:
    """Protects `run/indexes/<version>` from collection until `release` or this process ends.

    Raises OSError if the file system does not allow to create it.
    """

    def __init__(self, run: Path, version: Version) -> None:
        folder = _pin_folder(run, version)
        self._file = folder / f"{process_name()}.{uuid.uuid4().hex}"
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a collector removes the folder together with the version
                self._file.touch()
                return

    def release(self) -> None:
        self._file.unlink(missing_ok=True)


def pinning_processes(run: Path, version: Version) -> list[str]:
    """`host.pid` of every process that pins a version.

    Removes pins of dead processes of this host; a pin of another host counts as long as its file
    exists. Files that are not named like a pin do not count.
    """
    folder = _pin_folder(run, version)
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        pin = _PIN.fullmatch(entry.name)
        if pin is None or entry.is_dir():
            continue
        if pin["host"] == socket.gethostname() and not _is_alive(int(pin["pid"])):
            with suppress(OSError):  # such as a file system that is mounted read-only
                entry.unlink()
        else:
            found.append(f"{pin['host']}.{pin['pid']}")
    return found


def is_pinned(run: Path, version: Version) -> bool:
    """Whether a process pins the version."""
    return bool(pinning_processes(run, version))


@dataclass(frozen=True)
class Reference:
    """What a checkpoint needs of the index store, from `STAGE/checkpoints/step-*/index_version`."""

    index: Version
    """The version in use when the checkpoint was written."""
    step: int
    """The checkpoint's step."""

    def needs_encoder(self, encoder: Version) -> bool:
        """Whether a trainer that resumes may need an index of an encoder of its lineage.

        It may need those that the trainer could have used after the checkpoint, to bound staleness
        or to replay the log, and that it does not export again.
        """
        return self.index.step <= encoder.step <= self.step


def referenced_by_checkpoints(run: Path) -> list[Reference]:
    """The references of all checkpoints."""
    references = []
    for file in run.glob("*/checkpoints/step-*/index_version"):
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError, PublishError, ValueError):
            # Not found: the trainer removes old checkpoints.
            index = Version.parse(file.read_text(encoding="utf-8").strip())
            references.append(Reference(index, int(file.parent.name.removeprefix("step-"))))
    return references


class GarbageCollector:
    """Removes index versions that have been unneeded for `grace_s` seconds, then the exported
    encoders of removed versions.

    A version is unneeded if it is not among the newest `keep_last` of the newest attempt's lineage,
    no process pins it, no checkpoint references it and no replay requests it. The grace period
    protects processes on other NFS hosts, where access to a mapped file that was unlinked is a bus
    error. It is measured by this process's monotonic clock and restarts with each process. Only the
    lease holder may collect.
    """

    def __init__(self, run: Path, keep_last: int, grace_s: float) -> None:
        self.run = run
        self.keep_last = keep_last
        self.grace_s = grace_s
        self._unneeded_since: dict[Version, float] = {}

    def collect(self) -> list[Version]:
        """Remove unneeded versions; returns the removed indexes, then the removed encoders.

        Also removes the shards of encoders that were removed before they were indexed.
        """
        removed = self._collect_indexes() + self._collect_encoders()
        for version in versions_in(self.run / "refresher"):
            if not (self.run / "encoders" / version.name).exists():
                remove_path(self.run / "refresher" / version.name)
        return removed

    def in_grace_period(self) -> list[Version]:
        """Index versions that were unneeded at the last `collect` but not yet removed."""
        return sorted(self._unneeded_since)

    def _collect_indexes(self) -> list[Version]:
        now = time.monotonic()
        self._unneeded_since = {
            version: self._unneeded_since.get(version, now)
            for version in self._unneeded(versions_in(self.run / "indexes"))
        }
        removed = [
            version
            for version, since in self._unneeded_since.items()
            if now - since >= self.grace_s and self._remove(version)
        ]
        for version in removed:
            del self._unneeded_since[version]
        return removed

    def _unneeded(self, versions: Collection[Version]) -> list[Version]:
        """Those of `versions`, of which each is or was in the store, that are unneeded now."""
        # Pins before checkpoints: a trainer pins the version until its checkpoint references it.
        unpinned = [version for version in versions if not is_pinned(self.run, version)]
        referenced = {reference.index for reference in referenced_by_checkpoints(self.run)}
        requested = requested_exports(self.run)
        lineage = Lineage.load(self.run)  # last: a resume starts an attempt while its checkpoint exists
        if lineage.current is None:
            return []
        allowed = [
            version
            for version in sorted({*versions_in(self.run / "indexes"), *versions}, reverse=True)
            if lineage.allows(version, lineage.current)
        ]
        kept = {*referenced, *allowed[: self.keep_last], *(version for version in allowed if version.step in requested)}
        return [version for version in unpinned if version not in kept]

    def _collect_encoders(self) -> list[Version]:
        """Remove encoders without an index, except those newer than every index, of which the
        refresher may still build one, and those that a checkpoint needs."""
        references, requested = referenced_by_checkpoints(self.run), requested_exports(self.run)
        indexes, lineage = self.run / "indexes", Lineage.load(self.run)
        usable = [] if lineage.current is None else newest(indexes, lineage, lineage.current)
        if not usable:
            return []
        assert lineage.current is not None
        indexed = {version.encoder for version in versions_in(indexes)}
        removed = []
        for version in versions_in(self.run / "encoders"):
            needed = lineage.allows(version, lineage.current) and (
                version > usable[0].encoder
                or version.step in requested
                or any(reference.needs_encoder(version) for reference in references)
            )
            if not needed and version not in indexed:
                # Temporary files among the encoders are the trainer's.
                _remove_aside(self.run / "encoders" / version.name, self.run / "refresher")
                removed.append(version)
        return removed

    def _remove(self, version: Version) -> bool:
        """Remove an index version; returns False if it is needed in the meantime."""
        folder = self.run / "indexes" / version.name
        aside = folder.with_name(ASIDE + version.name)
        folder.rename(aside)
        if not self._unneeded([version]):
            aside.rename(folder)
            return False
        _remove_aside(aside, folder.parent)
        shutil.rmtree(_pin_folder(self.run, version), ignore_errors=True)
        return True


def _remove_aside(path: Path, temporary_in: Path) -> None:
    """Remove a published folder; it disappears as a whole, so that a kill does not leave a part."""
    temporary = temporary_in / f"{TEMPORARY}{path.name}-{uuid.uuid4().hex}"
    path.rename(temporary)
    remove_path(temporary)


def run_of_store(store: Path) -> Path:
    """The run folder that an index store belongs to: itself, or the one with it in `frozen/`."""
    return store.parent.parent if store.parent.name == FROZEN else store


def stores_of_run(store: Path) -> list[Path]:
    """All index stores of the run that `store` belongs to, `store` first."""
    run = run_of_store(store)
    return [store, *(other for other in (run, *sorted((run / FROZEN).glob("*"))) if other != store)]


def remove_path(path: Path) -> None:
    """Remove a file, a folder with its contents, or a symbolic link without its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_leftovers(run: Path) -> list[Path]:
    """Remove temporary files that crashes left in the run's index store; returns their paths.

    A version that a killed collector had moved aside is moved back; the next collection decides
    again. Only the lease holder may call it.
    """
    for aside in run.glob(f"indexes/{ASIDE}*"):
        folder = aside.with_name(aside.name.removeprefix(ASIDE))
        if not folder.exists():
            aside.rename(folder)
    leftovers = [*run.glob(f"indexes/{TEMPORARY}*"), *run.glob(f"refresher/{TEMPORARY}*")]
    for path in leftovers:
        remove_path(path)
    return leftovers


def _pin_folder(run: Path, version: Version) -> Path:
    return run / "refresher" / "holds" / version.name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
