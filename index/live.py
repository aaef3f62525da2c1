"""The trainer's side of the asynchronous index: exports, swaps between two steps, staleness, and
a refresher beside if asked for."""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from index.refresh import TRAINING_ENDED, start_refresher
from index.replay import clear_requested_exports, request_exports
from index.search import IndexWatcher, PassageIndex
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.runtime.distributed import all_ranks, any_rank, is_rank_zero, on_rank_zero, world_size
from realm.runtime.publish import TEMPORARY, published
from realm.runtime.telemetry import console, format_seconds
from realm.runtime.versions import Lineage, Version, newest, start_attempt
from realm.text.tokenizer import tokenizer_fingerprint
from realm.training.sections import RefreshConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def remove_export_leftovers(folder: Path) -> None:
    """Remove exports that a killed trainer left half-written. Only the run's one trainer may
    call it."""
    for path in (folder / "encoders").glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


class LiveIndex:
    """The index in use, and how it follows the refresher. One a trainer; use it as a context
    manager."""

    def __init__(
        self,
        folder: Path,
        config: RefreshConfig,
        attempt: int,
        watcher: IndexWatcher,
        replay: dict[int, int] | None = None,
    ) -> None:
        self.folder, self.config, self.attempt, self.watcher, self.replay = (
            folder,
            config,
            attempt,
            watcher,
            replay or {},
        )
        self.swaps = 0
        self.refresher: subprocess.Popen[bytes] | None = None
        self._index: PassageIndex | None = None
        self._next: PassageIndex | None = None
        self._warned_at: Version | None = None

    @classmethod
    def begin(
        cls,
        folder: Path,
        config: RefreshConfig,
        passages: PreparedCorpus,
        tokenizer: "PreTrainedTokenizerBase",
        dim: int,
        parent: int | None,
        step: int,
        replay: dict[int, int] | None = None,
        threads: int = 0,
    ) -> Self:
        """Start an attempt: a new run (`parent` None), or the continuation of attempt `parent` from
        `step`.

        `replay`: for each step, the export whose index it must search (see `index.replay`); steps
        it does not name take what is newest. `threads`: what the index is searched with; 0: FAISS's
        choice.
        """
        replay = {at: export for at, export in (replay or {}).items() if at >= step}

        def start() -> int:
            (folder / TRAINING_ENDED).unlink(missing_ok=True)
            remove_export_leftovers(folder)
            attempt = start_attempt(folder, parent, None if parent is None else step)
            request_exports(folder, replay, step) if replay else clear_requested_exports(folder)
            return attempt

        attempt = on_rank_zero(start)
        watcher = IndexWatcher(
            folder,
            attempt,
            passages.fingerprint,
            dim,
            tokenizer_fingerprint(tokenizer),
            config.poll_s,
            log=lambda line: console.print(f"  {line}"),
            follow=is_rank_zero() and not replay,
            threads=threads or None,
            search_on=config.search_on,
        )
        return cls(folder, config, attempt, watcher, replay)

    @property
    def index(self) -> PassageIndex:
        """The index of this step."""
        assert self._index is not None, "wait_for_first comes before the first search"
        return self._index

    def needs_export(self) -> bool:
        """Whether this lineage has no encoder yet that a refresher could build an index from."""
        return on_rank_zero(lambda: not newest(self.folder / "encoders", Lineage.load(self.folder), self.attempt))

    def export(self, step: int, write: Callable[[Path], object]) -> None:
        """Publish the retriever as `encoders/aNN-step-NNNNNN`; `write(folder)` fills it, on rank
        0 alone."""
        if not is_rank_zero():
            return
        with published(self.folder / "encoders" / Version(self.attempt, step).name) as folder:
            write(folder)

    def start_refresher(self) -> None:
        """Start a refresher beside the trainer: its own process, one for all ranks, its output
        in `refresher/output.log`."""
        if not is_rank_zero():
            return
        log = self.folder / "refresher" / "output.log"
        log.parent.mkdir(exist_ok=True)
        self.refresher = start_refresher(self.folder, log)
        console.print(f"  refresher started (process {self.refresher.pid}, output in {log})")

    def wait_for_first(self, step: int = 0) -> None:
        """Wait for the index that step `step` begins with, at most `refresh.wait_timeout_s`.
        Raises UserError naming the remedy when there is none by then."""
        if step in self.replay:
            self._wait_for_export(self.replay[step])
        else:
            self._wait(0, "the first index")

    def swap(self, step: int) -> None:
        """Between two steps: take a newer index if one is ready; apply the staleness policy if it
        lags too far behind.

        A step that a replay names takes exactly the index it names, and waits for it.
        """
        if step in self.replay:
            self._wait_for_export(self.replay[step])
            return
        if self.replay:
            self.replay = {}
            if is_rank_zero():
                clear_requested_exports(self.folder)
                self.watcher.follow = True
            console.print(f"  the log is followed up to step {step}; from here on the newest index counts")
        self._take()
        limit = self.config.max_stale_steps
        behind = step - self.index.step
        if limit is None or behind <= limit:
            return
        if self.config.stale_policy == "stop":
            raise UserError(
                f"the index is {behind} steps behind, more than refresh.max_stale_steps = {limit}; is the refresher running?"
            )
        if self.config.stale_policy == "wait":
            self._wait(step - limit, f"an index at most {limit} steps old (this one is {behind} behind)")
        elif self._warned_at != self.index.version:
            self._warned_at = self.index.version
            console.print(
                f"  warning: index {self.index.version} is {behind} steps behind (refresh.max_stale_steps = {limit}); is the refresher running?"
            )

    def telemetry(self, step: int) -> dict[str, float | str]:
        """Index version in use after `step` steps (the next step searches it one step ahead),
        steps it is behind, swaps so far."""
        return {
            "index": self.index.version.name,
            "steps_behind": float(step - self.index.step),
            "swaps": float(self.swaps),
        }

    def end_training(self) -> None:
        """Tell the refresher that no export will follow, and wait until the last index stands
        (if a refresher runs beside)."""
        if not is_rank_zero():
            return
        (self.folder / TRAINING_ENDED).touch()
        if self.refresher is not None:
            began = time.monotonic()
            try:
                self.refresher.wait(self.config.wait_timeout_s)
            except subprocess.TimeoutExpired:
                console.print(
                    f"  the refresher is still at the last index after {format_seconds(self.config.wait_timeout_s)} (refresh.wait_timeout_s); "
                    f"it is stopped, and goes on with `realm refresh --run {self.folder}`"
                )
                return
            console.print(f"  waited {format_seconds(time.monotonic() - began)} for the refresher's last index")

    def close(self) -> None:
        """Give back the index and end the refresher started beside."""
        self.watcher.stop()
        for index in (self._index, self._next):
            if index is not None:
                index.close()
        if self.refresher is not None and self.refresher.poll() is None:
            self.refresher.terminate()
            self.refresher.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        """Swap in the newest version that rank 0 has opened, on all ranks at once: when the last
        of them has opened it too."""
        if self._next is None:
            self._next = self.watcher.take()
        if world_size() > 1:
            chosen = on_rank_zero(lambda: None if self._next is None else self._next.version)
            if chosen is None:
                return
            if not is_rank_zero():
                self.watcher.request(chosen)
            if any_rank(chosen.name in self.watcher.refused):
                self._drop_next()
                return
            if not all_ranks(self._next is not None and self._next.version == chosen):
                if not is_rank_zero() and self._next is not None and self._next.version != chosen:
                    self._drop_next()
                return
        if self._next is None:
            return
        if self._index is not None:
            self.swaps += 1
            self._index.close()
        self._index, self._next = self._next, None

    def _drop_next(self) -> None:
        if self._next is not None:
            self._next.close()
            self._next = None

    def _wait(self, min_step: int, what: str) -> None:
        """Take versions until one of at least `min_step` is in use; raises UserError, on all
        ranks, when the time is up."""
        began = told = time.monotonic()
        while True:
            self._take()
            if self._index is not None and self._index.step >= min_step:
                break
            on_rank_zero(lambda: self._check_wait(time.monotonic() - began, what))
            if time.monotonic() - told >= 10.0:
                told = time.monotonic()
                console.print(
                    f"  waiting for {what}: {format_seconds(told - began)} of at most {format_seconds(self.config.wait_timeout_s)}"
                )
            if self.watcher.wait_for(min_step, 1.0):
                time.sleep(0.02)  # opened here, and soon on the other ranks
        if time.monotonic() - began > 0.5:
            console.print(f"  waited {format_seconds(time.monotonic() - began)} for {what}")

    def _wait_for_export(self, export: int) -> None:
        """Take the index of the export at step `export`; raises UserError, on all ranks, when
        the time is up."""
        began = time.monotonic()
        what = f"the index of step {export}, which the log names"
        while self._index is None or self._index.step != export:
            chosen = on_rank_zero(lambda: self._indexed(export))
            if chosen is not None:
                self.watcher.request(chosen)
                self._take()
            if self._index is None or self._index.step != export:
                on_rank_zero(lambda: self._check_wait(time.monotonic() - began, what))
                time.sleep(min(0.02, self.config.poll_s))

    def _indexed(self, export: int) -> Version | None:
        usable = newest(self.folder / "indexes", Lineage.load(self.folder), self.attempt)
        return next(
            (version for version in usable if version.step == export and version.name not in self.watcher.refused), None
        )

    def _check_wait(self, waited: float, what: str) -> None:
        if self.refresher is not None and self.refresher.poll() is not None and self.watcher.ready is None:
            raise UserError(
                f"the refresher ended with status {self.refresher.returncode} before {what} stood; see {self.folder}/refresher/output.log."
            )
        if waited >= self.config.wait_timeout_s:
            raise UserError(
                f"waited {format_seconds(waited)} for {what} in {self.folder / 'indexes'} (refresh.wait_timeout_s); "
                f"start `realm refresh --run {self.folder}` or pass --with-refresher."
            )
