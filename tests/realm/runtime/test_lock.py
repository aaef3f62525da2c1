"""Locks between processes."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from realm.errors import UserError
from realm.runtime.lock import locked

_HOLD = """
import sys, time
from pathlib import Path
from realm.runtime.lock import locked

with locked(Path(sys.argv[1]), "training run r"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "ict"


def test_a_lock_names_the_process_that_holds_it_until_that_is_killed(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
            with (
                pytest.raises(
                    UserError, match=f"process {holder.pid} on {socket.gethostname()} is already training run r;"
                ),
                locked(path, "training run r"),
            ):
                pass
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert path.exists(), "a killed process leaves the file, but not the lock"
            with locked(path, "training run r"):
                pass
        finally:
            holder.kill()


def test_a_lock_is_released_and_its_file_removed(path: Path) -> None:
    for _ in range(2):
        with locked(path, "training run r"):
            assert path.exists()
        assert not path.exists()
    with locked(path, "training run r"):
        with locked(path, "training run r"):
            pass
        assert path.exists(), "only the outer block releases the lock"
    with pytest.raises(RuntimeError), locked(path, "training run r"):
        raise RuntimeError
    assert not path.exists()


def test_a_file_that_its_holder_removes_is_locked_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def removed_first(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(path, "training run r"):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_folder_that_cannot_be_written_is_an_error(path: Path) -> None:
    path.parent.write_text("a file")
    with (
        pytest.raises(UserError, match=r"training run r needs the lock file .*; make .*locks writable"),
        locked(path, "training run r"),
    ):
        pass


def test_a_file_system_without_locks_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(path, "training run r"):
        pass
    assert "cannot be locked" in capsys.readouterr().out
