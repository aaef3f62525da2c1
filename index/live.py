"""The trainer's side of the asynchronous index: exports, swaps between steps, the staleness policy,
and an optional refresher process."""

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from index.refresh import TRAINING_ENDED
from index.refresher_process import start_refresher, stop_refresher
from index.replay import clear_requested_exports, request_exports
from index.retention import remove_path
from index.search import PassageIndex
from index.swap import IndexSlot
from index.watcher import IndexWatcher
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.runtime.distributed import is_rank_zero, on_rank_zero
from realm.runtime.publish import TEMPORARY, published
from realm.runtime.telemetry import console, format_seconds
from realm.runtime.versions import Lineage, Version, newest, start_attempt
from realm.text.tokenizer import tokenizer_fingerprint
from realm.training.refresh_section import RefreshConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def remove_export_leftovers(folder: Path) -> None:
    """Remove exports that a killed trainer left incomplete; only the run's trainer may call it."""
    for path in (folder / "encoders").glob(f"{TEMPORARY}*"):
        remove_path(path)


class LiveIndex:
    """The index in use, updated from the refresher; one per trainer, used as a context manager."""

    def __init__(
        self,
        folder: Path,
        config: RefreshConfig,
        attempt: int,
        watcher: IndexWatcher,
        replay: dict[int, int] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.attempt = attempt
        self.watcher = watcher
        self.replay = replay or {}
        self.refresher: subprocess.Popen[bytes] | None = None
        self._slot = IndexSlot(watcher)
        self._warned_version: Version | None = None

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
        lexical: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start an attempt: a new run (`parent` None), or the continuation of attempt `parent` from
        `step`.

        `replay`: maps a step to the export whose index it must search (see `index.replay`); other
        steps use the newest index. `threads`: threads per search; 0: FAISS's default. `lexical`:
        settings of the BM25 that each version must contain.
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
            lexical=lexical,
        )
        return cls(folder, config, attempt, watcher, replay)

    @property
    def index(self) -> PassageIndex:
        """The index in use."""
        assert self._slot.index is not None, "call wait_for_first before the first search"
        return self._slot.index

    def needs_export(self) -> bool:
        """Whether this lineage has no encoder yet from which a refresher could build an index."""
        return on_rank_zero(lambda: not newest(self.folder / "encoders", Lineage.load(self.folder), self.attempt))

    def export(self, step: int, write: Callable[[Path], object]) -> None:
        """Publish the retriever as `encoders/aNN-step-NNNNNN`; `write(folder)` saves it, on rank 0
        only."""

        def publish() -> None:
            with published(self.folder / "encoders" / Version(self.attempt, step).name) as folder:
                write(folder)

        on_rank_zero(publish)

    def start_refresher(self) -> None:
        """Start one refresher process for all ranks; its output goes to `refresher/output.log`."""

        def start() -> None:
            log = self.folder / "refresher" / "output.log"
            log.parent.mkdir(exist_ok=True)
            self.refresher = start_refresher(self.folder, log)
            console.print(f"  refresher started (process {self.refresher.pid}, output in {log})")

        on_rank_zero(start)

    def wait_for_first(self, step: int = 0) -> None:
        """Wait for the index of `step`, the first step, at most `refresh.wait_timeout_s`.

        Raises UserError if it does not become available in time.
        """
        if step in self.replay:
            self._wait_for_export(self.replay[step])
        else:
            self._wait_for_step(0, "the first index")

    def swap(self, step: int) -> None:
        """Swap in a newer index before `step` if one is ready, then apply the staleness policy.

        A replayed step waits for an index of the export that the log names.
        """
        if step in self.replay:
            self._wait_for_export(self.replay[step])
            return
        if self.replay:
            self.replay = {}
            if is_rank_zero():
                clear_requested_exports(self.folder)
                self.watcher.follow = True
            console.print(f"  replayed the log up to step {step}; from now on the newest index is used")
        self._slot.swap_if_ready()
        limit = self.config.max_stale_steps
        behind = step - self.index.step
        if limit is None or behind <= limit:
            return
        excess = f"{behind} steps behind (refresh.max_stale_steps = {limit})"
        if self.config.stale_policy == "stop":
            raise UserError(f"index {self.index.version} is {excess}; check that the refresher is running.")
        if self.config.stale_policy == "wait":
            self._wait_for_step(step - limit, f"an index at most {limit} steps behind (this one is {behind} behind)")
        elif self._warned_version != self.index.version:
            self._warned_version = self.index.version
            console.print(f"  warning: index {self.index.version} is {excess}; check that the refresher is running")

    def telemetry(self, step: int) -> dict[str, float | str]:
        """Index version in use after `step` steps (searched for the next step), the number of steps
        it is behind, and the number of swaps so far."""
        return {
            "index": self.index.version.name,
            "steps_behind": float(step - self.index.step),
            "swaps": float(self._slot.swaps),
        }

    def end_training(self) -> None:
        """Signal to the refresher that no export will follow, and wait until a refresher started by
        this trainer has built the last index."""
        if not is_rank_zero():
            return
        (self.folder / TRAINING_ENDED).touch()
        if self.refresher is not None:
            start = time.monotonic()
            try:
                self.refresher.wait(self.config.wait_timeout_s)
            except subprocess.TimeoutExpired:
                console.print(
                    f"  stopping the refresher: it has not finished the last index after "
                    f"{format_seconds(self.config.wait_timeout_s)} (refresh.wait_timeout_s); "
                    f"run `realm refresh --run {self.folder}` to finish it"
                )
                return
            console.print(f"  waited {format_seconds(time.monotonic() - start)} for the refresher's last index")

    def close(self) -> None:
        """Close the index, and stop the refresher process if this trainer started one."""
        self.watcher.stop()
        self._slot.close()
        if self.refresher is not None and self.refresher.poll() is None:
            stop_refresher(self.refresher)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for_step(self, min_step: int, what: str) -> None:
        """Swap until an index of step `min_step` or later is in use.

        Raises UserError, on all ranks, on timeout.
        """
        start = last_logged = time.monotonic()
        while True:
            self._slot.swap_if_ready()
            if self._slot.index is not None and self._slot.index.step >= min_step:
                break
            on_rank_zero(lambda: self._check_wait(time.monotonic() - start, what))
            if time.monotonic() - last_logged >= 10.0:
                last_logged = time.monotonic()
                waited, timeout = last_logged - start, self.config.wait_timeout_s
                console.print(f"  waiting for {what}: {format_seconds(waited)} of at most {format_seconds(timeout)}")
            if self.watcher.wait_for(min_step, 1.0):
                time.sleep(0.02)  # it is opened on this rank, and soon on the others
        if time.monotonic() - start > 0.5:
            console.print(f"  waited {format_seconds(time.monotonic() - start)} for {what}")

    def _wait_for_export(self, export: int) -> None:
        """Swap in the index of the export at step `export`; raises UserError, on all ranks, on
        timeout."""
        start = time.monotonic()
        what = f"the index of the export at step {export}, required by the replayed log"
        while self._slot.index is None or self._slot.index.step != export:
            chosen = on_rank_zero(lambda: self._find_index(export))
            if chosen is not None:
                self.watcher.request(chosen)
                self._slot.swap_if_ready()
            if self._slot.index is None or self._slot.index.step != export:
                on_rank_zero(lambda: self._check_wait(time.monotonic() - start, what))
                time.sleep(min(0.02, self.config.poll_s))

    def _find_index(self, export: int) -> Version | None:
        """The newest usable index of the export at step `export`."""
        usable = newest(self.folder / "indexes", Lineage.load(self.folder), self.attempt)
        return next(
            (version for version in usable if version.step == export and version.name not in self.watcher.refused), None
        )

    def _check_wait(self, waited_s: float, what: str) -> None:
        """Raise UserError if the refresher process has ended, or on timeout."""
        if self.refresher is not None and self.refresher.poll() is not None and self.watcher.ready is None:
            raise UserError(
                f"the refresher exited with status {self.refresher.returncode} before it built {what}; "
                f"see {self.folder}/refresher/output.log."
            )
        if waited_s >= self.config.wait_timeout_s:
            raise UserError(
                f"waited {format_seconds(waited_s)} for {what} in {self.folder / 'indexes'} (refresh.wait_timeout_s); "
                f"start `realm refresh --run {self.folder}` or pass --with-refresher."
            )
