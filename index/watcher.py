"""Follow the index versions that a refresher publishes, on a background thread."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from index.retention import VersionPin
from index.search import IndexRefused, PassageIndex
from realm.runtime.versions import Lineage, Version, newest


class IndexWatcher:
    """Opens and verifies new versions in `run/indexes` on a background thread, so that the trainer
    only replaces a reference.

    It considers the versions of `attempt` and its ancestors, the newest first, and none older than
    one already opened. A refused version is logged once with the reason, and the last valid one
    stays in use. With `follow` false, it only opens the versions passed to `request`: the other
    ranks open what rank 0 has chosen. The other arguments are those of `PassageIndex.open`.
    """

    def __init__(
        self,
        run: Path,
        attempt: int,
        corpus_fingerprint: str,
        dim: int | None = None,
        tokenizer_fingerprint: str | None = None,
        poll_s: float = 1.0,
        threads: int | None = None,
        log: Callable[[str], None] = print,
        follow: bool = True,
        search_on: str = "cpu",
        lexical: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.follow = follow
        self.refused: dict[str, str] = {}
        """Name of each refused version, and the reason."""
        self._open_index = partial(
            PassageIndex.open,
            corpus_fingerprint=corpus_fingerprint,
            dim=dim,
            tokenizer_fingerprint=tokenizer_fingerprint,
            threads=threads,
            search_on=search_on,
            lexical=lexical,
        )
        self._poll_s = poll_s
        self._log = log
        self._lineage = Lineage.load(run)
        self._changed = threading.Condition()
        self._ready: PassageIndex | None = None
        self._opened: Version | None = None
        self._requested: Version | None = None
        self._failure: BaseException | None = None
        self._last_error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="index-watcher", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> Version | None:
        """The version that `take` would return now."""
        with self._changed:
            return None if self._ready is None else self._ready.version

    def take(self) -> PassageIndex | None:
        """Return a newly opened version, once, or None; never waits for the file system.

        The caller closes the version that it replaces.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            index, self._ready = self._ready, None
            return index

    def request(self, version: Version) -> None:
        """Open `version` next; only used if `follow` is false."""
        self._requested = version

    def wait_for(self, min_step: int, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds until a version of `min_step` or later has been opened
        (taken or not); returns whether there is one."""

        def opened() -> bool:
            return self._opened is not None and self._opened.step >= min_step

        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or opened(), timeout_s)
            if self._failure is not None:
                raise self._failure
            return opened()

    def stop(self) -> None:
        """Stop the thread, and close an opened version that was not taken."""
        self._stop.set()
        self._thread.join()
        with self._changed:
            if self._ready is not None:
                self._ready.close()
                self._ready = None

    def __enter__(self) -> "IndexWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        # Reading every byte of a version must not slow down training steps. Linux has priorities
        # per thread.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not self._stop.is_set():
            try:
                self._poll()
                self._last_error = ""
            except OSError as error:  # such as a file server that fails for a while; training continues
                if str(error) != self._last_error:
                    self._last_error = str(error)
                    self._log(f"cannot read the index store, retrying every {self._poll_s:g} s: {error}")
            except BaseException as error:
                # A bug: pass it on to the trainer; otherwise the index would silently become stale.
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            self._stop.wait(self._poll_s)

    def _poll(self) -> None:
        """Open the newest version that is not opened yet, or the requested one."""
        if not self.follow:
            version = self._requested
            if (
                version is not None
                and version != self._opened
                and version.name not in self.refused
                and (index := self._open(version)) is not None
            ):
                self._set_ready(index)
            return
        for version in newest(self.run / "indexes", self._lineage, self.attempt):
            if self._opened is not None and version <= self._opened:
                return
            if version.name not in self.refused:
                index = self._open(version)
                if index is not None:
                    self._set_ready(index)
                    return

    def _open(self, version: Version) -> PassageIndex | None:
        """Pin, verify and open a version; None if it is refused or was already collected."""
        folder = self.run / "indexes" / version.name
        encoder = self.run / "encoders" / version.encoder.name
        pin = VersionPin(self.run, version)
        start = time.monotonic()
        try:
            index = self._open_index(folder, encoder=encoder if encoder.is_dir() else None)
        except BaseException as error:
            pin.release()
            if not isinstance(error, IndexRefused):
                raise
            if folder.is_dir():  # otherwise it was collected before it was pinned, which is not an error
                self.refused[version.name] = str(error)
                self._log(str(error))
            return None
        index.attach_pin(pin)
        self._log(f"index {version} opened and verified in {time.monotonic() - start:.2f} s")
        return index

    def _set_ready(self, index: PassageIndex) -> None:
        with self._changed:
            if self._ready is not None:
                self._ready.close()
            self._ready, self._opened = index, index.version
            self._changed.notify_all()
