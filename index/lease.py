"""A lease in the file system: only one refresher writes at a time, and a refresher that lost its
lease detects this before it publishes.

Each tenure is a directory `epoch-000003`. `mkdir` creates it, which is exclusive on local file
systems and on NFS. The highest epoch is valid until its holder writes `released` there or its
heartbeat stops. Epochs are never removed and only increase.
"""

import os
import threading
import time
from pathlib import Path
from types import TracebackType

from realm.errors import UserError

_BEATS_PER_EXPIRY = 6


class LeaseLost(UserError):
    """Another process took over the lease; nothing may be published under the old epoch."""


class Lease:
    """Exclusive right to write to a run's index store.

    `folder`: contains the epochs. `holder`: description of this process, for messages. `expiry_s`:
    a holder whose heartbeat does not change for this many seconds is considered dead. The observer
    measures this time with its own monotonic clock; other machines' clocks and file times are not
    used.
    """

    def __init__(self, folder: Path, holder: str, expiry_s: float) -> None:
        self.folder = folder
        self.holder = holder
        self.expiry_s = expiry_s
        self.epoch = 0
        """Epoch in which this process holds the lease; 0 if it does not hold it."""
        self._last_seen: tuple[int, bytes | None] | None = None
        self._changed_at = 0.0
        self._stop = threading.Event()
        self._heartbeat_thread: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Try once to acquire the lease, without waiting; returns True if it is acquired.

        Call it repeatedly: a dead holder is detected by comparing consecutive calls.
        """
        assert self.epoch == 0, "the lease is already acquired"
        self.folder.mkdir(parents=True, exist_ok=True)
        called_at = time.monotonic()
        latest = self._latest_epoch()
        if latest and not (self._path(latest) / "released").exists():
            seen = (latest, self._read_heartbeat(latest))
            if seen != self._last_seen:
                self._last_seen, self._changed_at = seen, time.monotonic()
                return False
            if called_at - self._changed_at < self.expiry_s:
                return False
        try:
            self._path(latest + 1).mkdir()
        except FileExistsError:
            return False
        self.epoch = latest + 1
        try:
            (self._path() / "holder").write_text(self.holder + "\n")
            _write_heartbeat(self._path(), 0)
        except OSError:  # such as a full disk: the epoch has no holder and expires like that of a dead one
            self.epoch = 0
            raise
        self._stop.clear()
        self._heartbeat_thread = threading.Thread(target=self._heartbeat_loop, name="lease-heartbeat", daemon=True)
        self._heartbeat_thread.start()
        return True

    def current_holder(self) -> str:
        """The process that holds or last held the lease, for messages."""
        try:
            return (self._path(self._latest_epoch()) / "holder").read_text(errors="replace").strip()
        except OSError:
            return "an unnamed process"

    def is_held(self) -> bool:
        """Whether no other process has taken over the lease; reads the file system."""
        return self.epoch > 0 and self._latest_epoch() == self.epoch

    def check(self) -> None:
        """Raise LeaseLost unless the lease is still held."""
        if not self.is_held():
            raise LeaseLost(
                f"the lease of epoch {self.epoch} in {self.folder} was taken over by {self.current_holder()}, because "
                f"this process was suspended or could not write for {self.expiry_s:g} s; that process continues the "
                "work, or rerun the command."
            )

    def release(self) -> None:
        """Stop the heartbeat and release the lease; no effect if it is not held or was lost."""
        self._stop.set()
        if self._heartbeat_thread is not None:
            self._heartbeat_thread.join()
        epoch, self.epoch = self.epoch, 0
        if epoch and self._latest_epoch() == epoch:
            (self._path(epoch) / "released").touch()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _path(self, epoch: int | None = None) -> Path:
        return self.folder / f"epoch-{self.epoch if epoch is None else epoch:06d}"

    def _latest_epoch(self) -> int:
        names = (entry.name.removeprefix("epoch-") for entry in self.folder.glob("epoch-*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _read_heartbeat(self, epoch: int) -> bytes | None:
        try:
            return (self._path(epoch) / "heartbeat").read_bytes()
        except FileNotFoundError:
            return None

    def _heartbeat_loop(self) -> None:
        path, count = self._path(), 0
        while not self._stop.wait(self.expiry_s / _BEATS_PER_EXPIRY):
            count += 1
            try:
                _write_heartbeat(path, count)
            except OSError:
                # A failed write is a missed heartbeat. If the failure lasts, other processes take
                # over the lease, and `check` raises.
                continue


def _write_heartbeat(epoch: Path, count: int) -> None:
    # Overwritten in place with constant length: it needs no space on a full disk, and a reader that
    # sees a partial write still sees a change.
    descriptor = os.open(epoch / "heartbeat", os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, b"%020d\n" % count, 0)
    finally:
        os.close(descriptor)
