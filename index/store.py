"""Who still needs an index version, and removing those nobody does.

A reader takes a hold, then looks again that the version exists; the collector moves a version aside, then looks again for holds and puts it
back if there is one. Whichever comes second sees the other, so no version disappears under a reader that looked.
"""

import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from realm.publish import TEMPORARY, Lineage, Version, newest, versions_in


def process_name() -> str:
    """`host.pid` of this process."""
    return f"{socket.gethostname()}.{os.getpid()}"


class Hold:
    """Keeps `run/indexes/<version>` from being collected until `release`, or until this process is gone."""

    def __init__(self, run: Path, version: Version) -> None:
        folder = _holds(run, version)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{process_name()}.{uuid.uuid4().hex}"
        self._file.touch()

    def release(self) -> None:
        self._file.unlink(missing_ok=True)


def is_held(run: Path, version: Version) -> bool:
    """Whether a reader holds the version. A hold of a dead process of this host is removed; one of another host counts while it stands."""
    folder = _holds(run, version)
    held = False
    for hold in folder.iterdir() if folder.is_dir() else ():
        host, pid, _ = hold.name.rsplit(".", 2)
        if host == socket.gethostname() and not _is_alive(int(pid)):
            hold.unlink(missing_ok=True)
        else:
            held = True
    return held


def pinned(run: Path) -> set[str]:
    """Names of the index versions that checkpoints need to resume exactly: the contents of `STAGE/checkpoints/step-*/index_version`."""
    names = set()
    for file in run.glob("*/checkpoints/step-*/index_version"):
        with suppress(FileNotFoundError):  # the trainer removes old checkpoints
            names.add(file.read_text().strip())
    return names


class Collector:
    """Removes versions that are not among the newest `keep_last`, are neither held nor pinned, and have been so for `grace_s` seconds.

    The grace period spares readers on other NFS hosts, where an unlinked file that is still mapped is a bus error. It runs by this
    process's monotonic clock and starts anew with each process. Only the holder of the lease may collect.
    """

    def __init__(self, run: Path, keep_last: int, grace_s: float) -> None:
        self.run = run
        self.keep_last = keep_last
        self.grace_s = grace_s
        self._unneeded_since: dict[Version, float] = {}

    def collect(self, lineage: Lineage, attempt: int) -> list[Version]:
        """Remove what may go now; returns the versions removed."""
        indexes = self.run / "indexes"
        kept = set(newest(indexes, lineage, attempt)[: self.keep_last])
        others = [version for version in versions_in(indexes) if version not in kept]
        pins = pinned(self.run) if others else set()
        now = time.monotonic()
        self._unneeded_since = {
            version: self._unneeded_since.get(version, now) for version in others if version.name not in pins and not is_held(self.run, version)
        }
        return [version for version, since in self._unneeded_since.items() if now - since >= self.grace_s and self._remove(version)]

    def _remove(self, version: Version) -> bool:
        folder = self.run / "indexes" / version.name
        aside = folder.parent / f"{TEMPORARY}{version.name}-{uuid.uuid4().hex}"
        folder.rename(aside)
        if is_held(self.run, version):
            aside.rename(folder)
            return False
        shutil.rmtree(aside)
        shutil.rmtree(_holds(self.run, version), ignore_errors=True)
        return True


def remove_leftovers(run: Path) -> list[Path]:
    """Remove what crashes left half-done in the run's index store; returns the paths. Only the holder of the lease may call it."""
    leftovers = [*run.glob(f"indexes/{TEMPORARY}*"), *run.glob(f"refresher/{TEMPORARY}*")]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return leftovers


def _holds(run: Path, version: Version) -> Path:
    return run / "refresher" / "holds" / version.name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
