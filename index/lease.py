"""A lease in the file system: one refresher writes, and one that lost its lease finds out before it
publishes.

Every tenure is a directory `epoch-000003`, created by `mkdir`, which excludes all others on local
file systems and on NFS. The highest epoch is in force until its holder writes `released` there or
lets its heartbeat stand still. Epochs are never removed: they only rise.
"""

import os
import threading
import time
from pathlib import Path
from types import TracebackType

_BEATS_PER_EXPIRY = 6


class LeaseLost(Exception):
    """Another process took the lease over; nothing may be published under the old epoch any more."""


class Lease:
    """Exclusive right to write in a run's index store.

    `folder`: where the epochs lie. `holder`: a text for people, who holds it. `expiry_s`: a
    heartbeat that does not change for so many seconds, by the observer's own monotonic clock, marks
    a dead holder; clocks of other machines and file times play no part.
    """

    def __init__(self, folder: Path, holder: str, expiry_s: float) -> None:
        self.folder = folder
        self.holder = holder
        self.expiry_s = expiry_s
        self.epoch = 0
        """Epoch in which this process holds the lease; 0 before it is acquired."""
        self._seen: tuple[int, bytes | None] | None = None
        self._changed_at = 0.0
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Look once, without waiting; True when the lease is ours. Call it again and again: only
        so is a dead holder noticed."""
        assert self.epoch == 0, "acquired already"
        self.folder.mkdir(parents=True, exist_ok=True)
        looked_at = time.monotonic()
        latest = self._latest()
        if latest and not (self._path(latest) / "released").exists():
            seen = (latest, self._heartbeat(latest))
            if seen != self._seen:
                self._seen, self._changed_at = seen, time.monotonic()
                return False
            if looked_at - self._changed_at < self.expiry_s:
                return False
        try:
            self._path(latest + 1).mkdir()
        except FileExistsError:
            return False
        self.epoch = latest + 1
        try:
            (self._path() / "holder").write_text(self.holder + "\n")
            self._beat(0)
        except OSError:  # a full disk: the epoch is taken and nobody's, and counts as that of a dead holder
            self.epoch = 0
            raise
        self._stop.clear()
        self._beating = threading.Thread(target=self._keep_beating, name="lease-heartbeat", daemon=True)
        self._beating.start()
        return True

    def current_holder(self) -> str:
        """Who holds, or last held, the lease; for messages."""
        try:
            return (self._path(self._latest()) / "holder").read_text().strip()
        except FileNotFoundError:
            return "an unnamed process"

    def still_held(self) -> bool:
        """Whether no other process has taken the lease over. Looks at the file system."""
        return self.epoch > 0 and self._latest() == self.epoch

    def check(self) -> None:
        """Raise LeaseLost unless the lease is still held."""
        if not self.still_held():
            raise LeaseLost(f"the lease of epoch {self.epoch} was taken over by {self.current_holder()}")

    def release(self) -> None:
        """Stop the heartbeat and let the next one in at once. Nothing happens where the lease is
        not held or was lost."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        if self.still_held():
            (self._path() / "released").touch()
        self.epoch = 0

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _path(self, epoch: int | None = None) -> Path:
        return self.folder / f"epoch-{self.epoch if epoch is None else epoch:06d}"

    def _latest(self) -> int:
        return max((int(entry.name.removeprefix("epoch-")) for entry in self.folder.glob("epoch-*")), default=0)

    def _heartbeat(self, epoch: int) -> bytes | None:
        try:
            return (self._path(epoch) / "heartbeat").read_bytes()
        except FileNotFoundError:
            return None

    def _beat(self, count: int) -> None:
        # In place and of constant length: it needs no room on a full disk, and a reader who sees
        # half of it still sees a change.
        descriptor = os.open(self._path() / "heartbeat", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, b"%020d\n" % count, 0)
        finally:
            os.close(descriptor)

    def _keep_beating(self) -> None:
        count = 0
        while not self._stop.wait(self.expiry_s / _BEATS_PER_EXPIRY):
            count += 1
            try:
                self._beat(count)
            except OSError:
                # A beat that cannot be written is a beat missed: if the trouble lasts, the others
                # see a dead holder, and `check` tells us.
                continue
