"""Exclusive locks between processes, such as one trainer per run."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from realm.errors import UserError
from realm.runtime.distributed import on_rank_zero
from realm.runtime.telemetry import log_line

_held: set[Path] = set()
"""Files that this process has locked."""


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Hold the lock file `path` during the block, on rank 0 for all ranks.

    `work` says what the block does, for messages, such as "training run X". The kernel releases the
    lock when the process ends, even by SIGKILL; the file is removed when the block ends. No effect
    inside a block that holds the same lock. On NFS, the lock is valid for all hosts, unless it is
    mounted with `nolock` or `local_lock`.

    Raises UserError, naming the process, if another one holds the lock, and if the file cannot be
    written. On a file system without locks, logs a warning and continues.
    """
    with ExitStack() as held:
        on_rank_zero(lambda: held.enter_context(_locked(path, work)))
        yield


@contextmanager
def _locked(path: Path, work: str) -> Iterator[None]:
    if path in _held:
        yield
        return
    descriptor = _acquire(path, work)
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        with suppress(OSError):
            path.unlink()  # while it is locked, so that no other process has locked it since
        os.close(descriptor)


def _acquire(path: Path, work: str) -> int:
    """Create and lock the file; returns its descriptor, which other programs do not inherit."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{work} needs the lock file {path}: {error}; make {path.parent} writable.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(f"{holder} is already {work}; wait until it ends, or stop it.") from None
        except OSError as error:
            log_line(f"warning: {path} cannot be locked ({error.strerror}); make sure that no other process is {work}")
            return descriptor
        if _is_same_file(descriptor, path):
            with suppress(OSError):  # such as a full disk: only the message of other processes needs the name
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
        os.close(descriptor)  # its last holder removed it before this process locked it


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
