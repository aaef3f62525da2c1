"""The lease: exclusion, takeover from dead and suspended holders, a full disk."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from index.lease import Lease, LeaseLost

EXPIRY_S = 0.6


def acquire(lease: Lease, timeout_s: float = 10.0) -> float:
    """Seconds until the lease was acquired."""
    started = time.monotonic()
    while not lease.try_acquire():
        assert time.monotonic() - started < timeout_s, "the lease was not acquired in time"
        time.sleep(0.02)
    return time.monotonic() - started


def start_holder(folder: Path) -> subprocess.Popen[str]:
    code = """
        import sys, time
        from pathlib import Path
        from index.lease import Lease
        lease = Lease(Path(sys.argv[1]), "other process", float(sys.argv[2]))
        while not lease.try_acquire():
            time.sleep(0.02)
        print("acquired", flush=True)
        sys.stdin.readline()
        print("held" if lease.is_held() else "lost", flush=True)
        lease.release()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(EXPIRY_S)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "acquired\n"
    return holder


def test_a_live_holder_excludes_others_until_it_releases(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    with Lease(tmp_path, "me", EXPIRY_S) as lease:
        until = time.monotonic() + 3 * EXPIRY_S
        while time.monotonic() < until:
            assert not lease.try_acquire()
            time.sleep(0.02)
        assert lease.current_holder() == "other process"
        assert holder.communicate("go\n", timeout=10)[0] == "held\n"
        assert lease.try_acquire()
        assert lease.epoch == 2 and lease.is_held()


def test_the_lease_of_a_killed_holder_expires_and_the_epoch_rises(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    holder.kill()
    holder.communicate()
    with Lease(tmp_path, "me", EXPIRY_S) as lease:
        assert acquire(lease) >= EXPIRY_S
        assert lease.epoch == 2


def test_a_holder_suspended_until_takeover_detects_that_it_lost_the_lease(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    os.kill(holder.pid, signal.SIGSTOP)
    with Lease(tmp_path, "me", EXPIRY_S) as lease:
        acquire(lease)
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.communicate("go\n", timeout=10)[0] == "lost\n"
        lease.check()
        assert lease.is_held(), "releasing a lost lease must not release ours"


def test_check_raises_after_the_lease_is_lost(tmp_path: Path) -> None:
    with Lease(tmp_path, "slow", EXPIRY_S) as lease:
        acquire(lease)
        (tmp_path / "epoch-000002").mkdir()
        with pytest.raises(LeaseLost, match="epoch 1"):
            lease.check()


def test_files_of_other_names_are_not_epochs(tmp_path: Path) -> None:
    for name in ("epoch-", "epoch-x", "epoch--3", ".epoch-9"):
        (tmp_path / name).touch()
    with Lease(tmp_path, "me", EXPIRY_S) as lease:
        assert lease.try_acquire() and lease.epoch == 1
        (tmp_path / "epoch-000001" / "holder").write_bytes(b"\xff")
        assert lease.current_holder()
        (tmp_path / "epoch-000001" / "holder").unlink()
        (tmp_path / "epoch-000001" / "holder").mkdir()
        assert lease.current_holder() == "an unnamed process"


def test_a_released_lease_can_be_released_again(tmp_path: Path) -> None:
    lease = Lease(tmp_path, "me", EXPIRY_S)
    assert lease.try_acquire()
    lease.release()
    lease.release()
    assert not lease.is_held() and [path.name for path in tmp_path.iterdir()] == ["epoch-000001"]


def test_one_of_many_concurrent_threads_acquires_the_lease(tmp_path: Path) -> None:
    leases = [Lease(tmp_path, f"thread {i}", EXPIRY_S) for i in range(16)]
    start, granted = threading.Barrier(len(leases)), []

    def acquire_at_once(lease: Lease) -> None:
        start.wait()
        if lease.try_acquire():
            granted.append(lease)

    threads = [threading.Thread(target=acquire_at_once, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lease.epoch for lease in granted] == [1]
    granted[0].release()


def test_an_epoch_without_a_heartbeat_expires(tmp_path: Path) -> None:
    (tmp_path / "epoch-000007").mkdir()
    with Lease(tmp_path, "me", EXPIRY_S) as lease:
        assert acquire(lease) >= EXPIRY_S
        assert lease.epoch == 8


def test_an_epoch_taken_on_a_full_disk_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    first, second = Lease(tmp_path, "first", EXPIRY_S), Lease(tmp_path, "second", EXPIRY_S)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            first.try_acquire()
        assert first.epoch == 0
    assert acquire(second) >= EXPIRY_S and second.epoch == 2
    second.release()
