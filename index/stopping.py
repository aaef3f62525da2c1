"""Stop a refresher within seconds: on SIGINT or SIGTERM, or when the trainer that started it ends.

A refresher looks between batches whether it should stop. A call of FAISS may take minutes, and
Python runs signal handlers only after it. So a thread watches for the reason to stop, and exits the
process if the main thread does not return in time, as kill -9 would: finished shards are kept.
"""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

GRACE_S = 3.0
"""Seconds in which the main thread can stop by itself."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PARENT = "REALM_REFRESHER_PARENT"
"""Environment variable with the descriptor of a pipe that is closed when the parent ends."""


@contextmanager
def stopping(stop: threading.Event, release: Callable[[], object]) -> Iterator[None]:
    """Set `stop` on SIGTERM and SIGINT, and when the parent process that called `parent_pipe`
    ends.

    If the block does not end within `GRACE_S` seconds after that, calls `release` and exits the
    process with status 128 + signal. No effect outside the main thread, which alone receives
    signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    ended = threading.Event()
    parent = os.environ.pop(_PARENT, None)
    sources = [woken] if parent is None else [woken, int(parent)]

    def watch() -> None:
        number: int = signal.SIGTERM  # if the parent ended
        ready = select.select(sources, [], [])[0]
        while ready == [woken] and (number := os.read(woken, 1)[0]) not in _SIGNALS:
            if ended.is_set():
                return
            ready = select.select(sources, [], [])[0]
        stop.set()
        if ready == [woken] and wake_before != -1:
            os.write(wake_before, bytes([number]))  # a watch of the whole command learns of it too
        if not ended.wait(GRACE_S):
            with suppress(OSError):
                os.write(2, b"realm: interrupted\n")
                release()
            os._exit(128 + number)

    before = {number: signal.signal(number, lambda *_: stop.set()) for number in _SIGNALS}
    wake_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="stop-watcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        os.write(wake, b"\0")
        thread.join()
        signal.set_wakeup_fd(wake_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        for descriptor in (wake, *sources):
            os.close(descriptor)


def parent_pipe(environment: dict[str, str]) -> int:
    """Open a pipe that is closed when this process ends, also by kill -9, and name it in the
    `environment` of a child process, which must inherit the returned descriptor."""
    read, write = os.pipe()
    os.register_at_fork(after_in_child=lambda: os.close(write))  # only this process keeps it open
    environment[_PARENT] = str(read)
    return read
