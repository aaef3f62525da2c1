"""Who still needs an index version, and removing those nobody does.

A reader takes a hold, then looks again that the version exists; the collector moves a version
aside, then looks again for holds and puts it back if there is one. Whichever comes second sees the
other, so no version disappears under a reader that looked.
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


class ReaderPin:
    """Keeps `run/indexes/<version>` from being collected until `release`, or until this process
    is gone."""

    def __init__(self, run: Path, version: Version) -> None:
        folder = _pin_folder(run, version)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{process_name()}.{uuid.uuid4().hex}"
        self._file.touch()

    def release(self) -> None:
        self._file.unlink(missing_ok=True)


def pinning_readers(run: Path, version: Version) -> list[str]:
    """`host.pid` of every hold of a reader. One of a dead process of this host is removed; one
    of another host counts while it stands."""
    folder = _pin_folder(run, version)
    found = []
    for hold in folder.iterdir() if folder.is_dir() else ():
        host, pid, _ = hold.name.rsplit(".", 2)
        if host == socket.gethostname() and not _is_alive(int(pid)):
            hold.unlink(missing_ok=True)
        else:
            found.append(f"{host}.{pid}")
    return found


def is_pinned(run: Path, version: Version) -> bool:
    """Whether a reader holds the version."""
    return bool(pinning_readers(run, version))


def referenced_by_checkpoints(run: Path) -> set[str]:
    """Names of the index versions that checkpoints need to resume exactly: the contents of
    `STAGE/checkpoints/step-*/index_version`."""
    names = set()
    for file in run.glob("*/checkpoints/step-*/index_version"):
        with suppress(FileNotFoundError):  # the trainer removes old checkpoints
            names.add(file.read_text().strip())
    return names


class GarbageCollector:
    """Removes versions that are not among the newest `keep_last`, are neither held nor pinned, and
    have been so for `grace_s` seconds; then the exported encoders of versions that are gone.

    The grace period spares readers on other NFS hosts, where an unlinked file that is still mapped
    is a bus error. It runs by this process's monotonic clock and starts anew with each process.
    Only the holder of the lease may collect.
    """

    def __init__(self, run: Path, keep_last: int, grace_s: float) -> None:
        self.run = run
        self.keep_last = keep_last
        self.grace_s = grace_s
        self._unneeded_since: dict[Version, float] = {}

    def collect(self, lineage: Lineage, attempt: int) -> list[Version]:
        """Remove what may go now; returns the index versions removed, then the encoders."""
        return self._collect_indexes(lineage, attempt) + self._collect_encoders(lineage, attempt)

    def in_grace_period(self) -> list[Version]:
        """Index versions that nobody needed when `collect` looked last, and whose grace period
        was not over yet."""
        return sorted(self._unneeded_since)

    def _collect_indexes(self, lineage: Lineage, attempt: int) -> list[Version]:
        indexes = self.run / "indexes"
        usable, replayed = newest(indexes, lineage, attempt), requested_exports(self.run)
        kept = {*usable[: self.keep_last], *(version for version in usable if version.step in replayed)}
        others = [version for version in versions_in(indexes) if version not in kept]
        pins = referenced_by_checkpoints(self.run) if others else set()
        now = time.monotonic()
        self._unneeded_since = {
            version: self._unneeded_since.get(version, now)
            for version in others
            if version.name not in pins and not is_pinned(self.run, version)
        }
        gone = [
            version
            for version, since in self._unneeded_since.items()
            if now - since >= self.grace_s and self._remove(version)
        ]
        for version in gone:
            del self._unneeded_since[version]
        return gone

    def _collect_encoders(self, lineage: Lineage, attempt: int) -> list[Version]:
        """An encoder is needed while an index of it stands, and while it is newer than every
        index: one of it may yet be built."""
        encoders = self.run / "encoders"
        indexed = {version.encoder for version in versions_in(self.run / "indexes")}
        usable = [version.encoder for version in newest(self.run / "indexes", lineage, attempt)]
        if not usable:
            return []
        removed, replayed = [], requested_exports(self.run)
        for version in versions_in(encoders):
            if version.step in replayed and lineage.allows(version, attempt):
                continue
            abandoned = not lineage.allows(version, attempt)
            if version not in indexed and (
                abandoned or (version.step, version.attempt) < (usable[0].step, usable[0].attempt)
            ):
                shutil.rmtree(
                    encoders / version.name
                )  # nobody opens it any more; a kill halfway leaves it to the next look
                removed.append(version)
        return removed

    def _remove(self, version: Version) -> bool:
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
    """Remove what crashes left half-done in the run's index store; returns the paths. Only the
    holder of the lease may call it.

    A version that a collector had moved aside when it was killed is put back if a reader holds it.
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
    """The version that a temporary folder is the whole of, if it is."""
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
