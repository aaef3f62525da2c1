"""Ctrl-C and SIGTERM: training stops where it can be resumed, other work at once.

Python calls the handler of a signal between two of its own instructions, so not during a long call
of a library, and libraries may catch the exception that a handler raises. Therefore, a thread also
watches for signals, and ends the process if it does not end by itself.
"""

import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_S = 3.0
"""Seconds that a process has to end after a signal; writing a checkpoint does not count."""

_RESEND_S = 0.05
"""Seconds until a signal that could not be raised is sent again."""

_IMPORTER = "<frozen importlib._bootstrap>"
"""File name of the code of Python's import system."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the message says how to resume."""


class Stopped(KeyboardInterrupt):
    """What the handlers raise. Python ends a process with SIGINT in which some library saw a plain
    KeyboardInterrupt, whatever the process makes of it later."""


class SignalWatch:
    """The signals that this process received, from the start of a command."""

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal."""
        _handled.clear()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._interrupt) for number in _SIGNALS}
        self._lost = False
        """Whether the signal must be sent again, because it could not be raised."""
        self._previous_hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if _is_importing(frame):
            self._lost = True
            return
        first = not _handled
        _handled.add(number)
        if first:  # others would interrupt what this one has started: cleaning up
            raise Stopped

    def _unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Python drops an exception that a destructor raises; the signal is sent again."""
        if isinstance(unraisable.exc_value, Stopped):
            self._lost = True
        else:
            self._previous_hook(unraisable)

    def _restore(self) -> None:
        """Restore the previous handlers."""
        sys.unraisablehook = self._previous_hook
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._write_end)

    def leave_to_parent(self) -> None:
        """In a process forked from this one: its signals are not those of the command."""
        self._restore()
        os.close(self._read_end)

    def stop(self) -> None:
        """Restore the previous handlers, and end the watching thread."""
        self._restore()
        self._thread.join()
        os.close(self._read_end)

    def _watch(self) -> None:
        """End the process in time after a signal that is not deferred, or is repeated."""
        counts, deadline = Counter[int](), float("inf")
        while time.monotonic() < deadline:
            ready, *_ = select.select([self._read_end], [], [], 0.1 if counts else None)
            numbers = os.read(self._read_end, 100) if ready else b""
            if ready and not numbers:  # `stop` was called
                return
            counts.update(number for number in numbers if number in _SIGNALS)
            if counts:
                self.received = self.received or next(iter(counts))
                if self._lost:
                    time.sleep(_RESEND_S)
                    self._lost = False
                    _handled.clear()
                    signal.pthread_kill(threading.main_thread().ident or 0, self.received)
                if not _deferring or max(counts.values()) > 1:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        assert self.received is not None
        _end_process(self.received)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: the initialization of C++ extensions, such as torch's,
    aborts the process if an exception is raised in it."""
    while frame is not None and frame.f_code.co_filename != _IMPORTER:
        frame = frame.f_back
    return frame is not None


_watches: list[SignalWatch] = []
"""The running watch of this process, if any."""


def _forget_watches() -> None:
    while _watches:
        _watches.pop().leave_to_parent()


os.register_at_fork(after_in_child=_forget_watches)

_handled: set[int] = set()
"""Numbers of the signals whose handlers were called."""

_deferring: list[threading.Event] = []
"""The event of `stop_signals`, while it waits for the end of a step."""


@contextmanager
def watched_signals() -> Iterator[SignalWatch]:
    """Raise KeyboardInterrupt in the main thread on SIGINT and SIGTERM.

    If the process still runs `GRACE_S` seconds later, it is ended with status 128 + signal; its
    child processes get SIGTERM. Must be called from the main thread, around a whole command.
    """
    watch = SignalWatch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        if watch.received is None and watch in _watches:  # otherwise the process is about to end
            _watches.remove(watch)
            watch.stop()


def _end_process(number: int) -> None:
    with suppress(Exception):
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.terminate()
    with suppress(Exception):
        print("realm: interrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Start child processes in this block that ignore Ctrl-C from their first instruction on.

    A terminal sends SIGINT to them too, but only this process should report it and stop them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set, instead of raising in the middle of a step.

    The second signal of a kind raises KeyboardInterrupt; launchers add a SIGTERM to Ctrl-C. Only
    the main thread receives signals; in other threads, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, _: object) -> None:
        repeated = number in _handled
        _handled.add(number)
        event.set()
        if repeated:
            raise Stopped

    _handled.clear()
    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    _deferring.append(event)
    try:
        yield event
    finally:
        _deferring.remove(event)
        for number, handler in previous.items():
            signal.signal(number, handler)
