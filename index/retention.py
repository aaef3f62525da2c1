"""Retention of index versions: which versions are needed, and garbage collection of the others.

In addition to the newest versions, two kinds are kept. A version is *pinned* by a process that has
it open: a `VersionPin`, a file under `refresher/holds/`. A version is *referenced* by a checkpoint
that needs it to resume exactly: the checkpoint names it in its file `index_version`.

A process that opens a version creates a pin and then checks that the version still exists. The
collector renames a version, then checks for pins, and renames it back if there is one. Whichever
acts second sees the action of the other, so no version disappears after a process has pinned and
checked it.
"""

import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from index.replay import requested_exports
from realm.runtime.publish import MANIFEST, TEMPORARY, PublishError
from realm.runtime.versions import Lineage, Version, newest, versions_in


def process_name() -> str:
    """`host.pid` of this process."""
    return f"{socket.gethostname()}.{os.getpid()}"


class VersionPin:
    """Protects `run/indexes/<version>` from collection until `release` or this process ends."""

    def __init__(self, run: Path, version: Version) -> None:
        folder = _pin_folder(run, version)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{process_name()}.{uuid.uuid4().hex}"
        self._file.touch()

    def release(self) -> None:
        self._file.unlink(missing_ok=True)


def pinning_processes(run: Path, version: Version) -> list[str]:
    """`host.pid` of every process that pins a version.

    Removes pins of dead processes of this host; a pin of another host counts as long as its file
    exists.
    """
    folder = _pin_folder(run, version)
    found = []
    for pin in folder.iterdir() if folder.is_dir() else ():
        host, pid, _ = pin.name.rsplit(".", 2)
        if host == socket.gethostname() and not _is_alive(int(pid)):
            pin.unlink(missing_ok=True)
        else:
            found.append(f"{host}.{pid}")
    return found


def is_pinned(run: Path, version: Version) -> bool:
    """Whether a process pins the version."""
    return bool(pinning_processes(run, version))


def referenced_by_checkpoints(run: Path) -> set[str]:
    """Names of the index versions that checkpoints reference, read from
    `STAGE/checkpoints/step-*/index_version`."""
    names = set()
    for file in run.glob("*/checkpoints/step-*/index_version"):
        with suppress(FileNotFoundError):  # the trainer removes old checkpoints
            names.add(file.read_text().strip())
    return names


class GarbageCollector:
    """Removes index versions that have been unneeded for `grace_s` seconds, then the exported
    encoders of removed versions.

    A version is unneeded if it is not among the newest `keep_last`, no process pins it, no
    checkpoint references it and no replay requests it. The grace period protects processes on other
    NFS hosts, where access to a mapped file that was unlinked is a bus error. It is measured by
    this process's monotonic clock and restarts with each process. Only the lease holder may
    collect.
    """

    def __init__(self, run: Path, keep_last: int, grace_s: float) -> None:
        self.run = run
        self.keep_last = keep_last
        self.grace_s = grace_s
        self._unneeded_since: dict[Version, float] = {}

    def collect(self, lineage: Lineage, attempt: int) -> list[Version]:
        """Remove unneeded versions; returns the removed indexes, then the removed encoders."""
        return self._collect_indexes(lineage, attempt) + self._collect_encoders(lineage, attempt)

    def in_grace_period(self) -> list[Version]:
        """Index versions that were unneeded at the last `collect` but not yet removed."""
        return sorted(self._unneeded_since)

    def _collect_indexes(self, lineage: Lineage, attempt: int) -> list[Version]:
        indexes = self.run / "indexes"
        usable, requested = newest(indexes, lineage, attempt), requested_exports(self.run)
        kept = {*usable[: self.keep_last], *(version for version in usable if version.step in requested)}
        others = [version for version in versions_in(indexes) if version not in kept]
        referenced = referenced_by_checkpoints(self.run) if others else set()
        now = time.monotonic()
        self._unneeded_since = {
            version: self._unneeded_since.get(version, now)
            for version in others
            if version.name not in referenced and not is_pinned(self.run, version)
        }
        removed = [
            version
            for version, since in self._unneeded_since.items()
            if now - since >= self.grace_s and self._remove(version)
        ]
        for version in removed:
            del self._unneeded_since[version]
        return removed

    def _collect_encoders(self, lineage: Lineage, attempt: int) -> list[Version]:
        """Remove encoders without an index, except those newer than every index: the refresher may
        still build theirs."""
        encoders = self.run / "encoders"
        indexed = {version.encoder for version in versions_in(self.run / "indexes")}
        usable = [version.encoder for version in newest(self.run / "indexes", lineage, attempt)]
        if not usable:
            return []
        removed, requested = [], requested_exports(self.run)
        for version in versions_in(encoders):
            if version.step in requested and lineage.allows(version, attempt):
                continue
            abandoned = not lineage.allows(version, attempt)
            if version not in indexed and (
                abandoned or (version.step, version.attempt) < (usable[0].step, usable[0].attempt)
            ):
                # No process opens it from now on. After a kill, the next call finishes the removal.
                shutil.rmtree(encoders / version.name)
                removed.append(version)
        return removed

    def _remove(self, version: Version) -> bool:
        """Remove an index version; returns False if a process has pinned it in the meantime."""
        folder = self.run / "indexes" / version.name
        aside = folder.parent / f"{TEMPORARY}{version.name}-{uuid.uuid4().hex}"
        folder.rename(aside)
        if is_pinned(self.run, version):
            aside.rename(folder)
            return False
        shutil.rmtree(aside)
        shutil.rmtree(_pin_folder(self.run, version), ignore_errors=True)
        return True


def remove_leftovers(run: Path) -> list[Path]:
    """Remove temporary files that crashes left in the run's index store; returns their paths.

    A version that a killed collector had renamed is restored if a process pins it. Only the lease
    holder may call it.
    """
    removed = []
    for path in (*run.glob(f"indexes/{TEMPORARY}*"), *run.glob(f"refresher/{TEMPORARY}*")):
        version = _moved_aside(path)
        if version is not None and is_pinned(run, version) and not (run / "indexes" / version.name).exists():
            path.rename(run / "indexes" / version.name)
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    return removed


def _moved_aside(path: Path) -> Version | None:
    """The version that a collector renamed to a temporary folder, or None for any other path."""
    with suppress(PublishError):
        if (path / MANIFEST).exists():
            return Version.parse(path.name.removeprefix(TEMPORARY).rsplit("-", 1)[0])
    return None


def _pin_folder(run: Path, version: Version) -> Path:
    return run / "refresher" / "holds" / version.name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
