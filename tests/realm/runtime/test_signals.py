"""Signals: what is stopped at once, what is finished first, and what is ended by force."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from realm.runtime.signals import Stopped, stop_signals, watched_signals

ROOT = Path(__file__).resolve().parents[3]

_STUBBORN = """
import subprocess, sys, time
from realm.runtime import signals

signals.GRACE_S = 0.2
with signals.watched_signals():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue
"""

_STEP = """
import time
from realm.runtime import signals

signals.GRACE_S = 0.2
with signals.watched_signals() as watch:
    with signals.stop_signals() as stop:
        print("step", flush=True)
        stop.wait(60)
        time.sleep(0.6)
        print("checkpoint", flush=True)
    print(watch.received, flush=True)
    time.sleep(60)
"""

_CLEANING_UP = """
import signal
from realm.runtime.signals import watched_signals

with watched_signals():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        print("cleaned up")
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_process_that_ignores_a_signal_is_ended_with_its_children() -> None:
    process = start(_STUBBORN)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and errors == "realm: interrupted\n"
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


def test_the_time_to_end_begins_after_the_checkpoint() -> None:
    process = start(_STEP)
    assert process.stdout is not None and process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert output == "checkpoint\n2\n" and errors == "realm: interrupted\n" and process.returncode == 130


def test_only_a_repeated_signal_stops_a_step() -> None:
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_only_the_first_signal_is_raised() -> None:
    process = start(_CLEANING_UP)
    output, errors = process.communicate(timeout=30)
    assert (output, errors, process.returncode) == ("cleaned up\n", "", 0)


def test_a_signal_during_a_destructor_is_not_lost() -> None:
    process = start("""
import signal, time
from realm.runtime.signals import watched_signals

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

with watched_signals():
    value = Interrupted()
    try:
        del value
        time.sleep(60)
    except KeyboardInterrupt:
        print("cleaned up")
""")
    assert process.communicate(timeout=30) == ("cleaned up\n", "") and process.returncode == 0


def test_a_signal_during_an_import_is_raised_after_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("""
import signal, time
try:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.3)
    print("imported")
except BaseException:
    print("interrupted during the import")
""")
    process = start(f"""
import sys, time
from realm.runtime.signals import watched_signals

sys.path.insert(0, {str(tmp_path)!r})
with watched_signals():
    try:
        import slow
        time.sleep(60)
    except KeyboardInterrupt:
        print("cleaned up")
""")
    assert process.communicate(timeout=30) == ("imported\ncleaned up\n", "") and process.returncode == 0


def test_handlers_are_restored() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with watched_signals():
        assert signal.getsignal(signal.SIGTERM) not in handlers
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_signals_of_a_forked_process_are_its_own() -> None:
    code = """
import multiprocessing, signal, time
from realm.runtime import signals

signals.GRACE_S = 0.2
with signals.watched_signals() as watch:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=lambda: ready.set() or time.sleep(60))
    child.start()
    ready.wait()
    child.terminate()
    child.join()
    time.sleep(0.6)
    print(child.exitcode, watch.received)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGTERM} None\n"), done.stderr
