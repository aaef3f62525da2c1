"""The refresher: builds an index for exported encoders and publishes it, through the file system
only.

It can be started, killed and restarted at any time: finished shards are kept, and a lease ensures
that only one refresher writes.
"""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import faiss
import torch

from index.encode import SINGLE_PROCESS, Encoder, NonFiniteEmbeddings, load_encoder
from index.fusion import Fusion
from index.lease import Lease
from index.replay import requested_exports
from index.retention import GarbageCollector, process_name, remove_leftovers, remove_path
from index.stopping import stopping
from index.version_build import Stopped, Superseded, VersionBuild, matches_config
from index.workers import WorkerGroup
from realm.errors import UserError
from realm.runtime.printable import printable
from realm.runtime.versions import Lineage, Version, newest, versions_in
from realm.training.refresh_section import RefreshConfig

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus

TRAINING_ENDED = "training-ended"
"""File that the trainer creates in the run folder after its last export."""

_RETRY_S = 1.0
"""Seconds between attempts after an error of the file system."""


def _print_and_flush(line: str) -> None:
    print(printable(line), flush=True)


def _discard(line: str) -> None:
    pass


def refresh(
    run: Path,
    config: RefreshConfig,
    corpus: "PreparedCorpus",
    once: bool = False,
    log: Callable[[str], None] = _print_and_flush,
    load: Callable[[Path], Encoder] = load_encoder,
    stop: threading.Event | None = None,
    workers: WorkerGroup = SINGLE_PROCESS,
    fusion: Fusion | None = None,
) -> None:
    """Build an index for the newest exported encoder, repeatedly, until training has ended and no
    work is left.

    `once`: return as soon as no work is left. `stop`: set it to return early; SIGTERM and SIGINT
    set it if this function is called from the main thread (see `index.stopping`). Waits while
    another refresher holds the lease.
    `workers`: the group of processes that encode together; all call this function with the same
    arguments, and the first of them holds the lease, builds and publishes.
    `fusion`: if it uses BM25, each version contains it; a version without it is built again, from
    the embeddings that it has. Default: no BM25.

    Raises UserError if no index can be built as configured (factory string, tokenizer), and
    LeaseLost if another refresher took over. An encoder with non-finite embeddings is logged and
    skipped; with `once` it raises NonFiniteEmbeddings.
    """
    torch.set_num_threads(config.threads)
    faiss.omp_set_num_threads(config.threads)
    stop = stop or threading.Event()
    refresher = _Refresher(run, config, corpus, log if workers.is_first else _discard, load, stop, workers, fusion)
    lease = Lease(run / "refresher" / "lease", process_name(), config.lease_expiry_s)
    with stopping(stop, lease.release), lease:
        if workers.run_on_first(lambda: refresher.acquire(lease, once)):
            refresher.run_loop(lease, once)


class _Refresher:
    """State of one `refresh` call."""

    def __init__(
        self,
        run: Path,
        config: RefreshConfig,
        corpus: "PreparedCorpus",
        log: Callable[[str], None],
        load: Callable[[Path], Encoder],
        stop: threading.Event,
        workers: WorkerGroup,
        fusion: Fusion | None,
    ) -> None:
        self.run = run
        self.fusion = fusion or Fusion()
        self.config = config
        self.corpus = corpus
        self.log = log
        self.load = load
        self.stop = stop
        self.workers = workers
        self.collector = GarbageCollector(run, config.keep_last, config.grace_s)
        self.skipped: set[Version] = set()
        """Encoders with non-finite embeddings."""
        self.last_superseded = False
        """Whether the last build was dropped for a newer export."""
        self.last_error = ""
        """Last error of the file system; repeated errors are logged once."""

    def acquire(self, lease: Lease, once: bool) -> bool:
        """Wait for the lease; returns False if no work is left to acquire it for."""
        waiting = False
        while not self._try_acquire(lease, once):
            if self.stop.is_set() or (self._no_more_exports(once) and self._next_version() is None):
                return False
            if not waiting:
                waiting = True
                self.log(
                    f"refresher {lease.current_holder()} holds the lease; waiting until it exits, "
                    f"or for {self.config.lease_expiry_s:g} s without a heartbeat"
                )
            self.stop.wait(min(self.config.poll_s, self.config.lease_expiry_s / 4))
        try:
            for path in remove_leftovers(self.run):
                self.log(f"removed {path.name}, left over from a crash")
        except OSError as error:
            self.log(f"cannot remove what a crash left over: {error}")
        return True

    def _try_acquire(self, lease: Lease, once: bool) -> bool:
        try:
            return lease.try_acquire()
        except OSError as error:
            if once or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(
                    f"cannot acquire the lease in {lease.folder}: {error}; fix this and rerun the command."
                ) from error
            if str(error) != self.last_error:
                self.last_error = str(error)
                self.log(f"cannot acquire the lease, retrying: {error}")
            return False

    def run_loop(self, lease: Lease, once: bool) -> None:
        """Build versions until no work is left; the first worker decides for all workers."""
        while True:
            try:
                running, version = self.workers.run_on_first(lambda: self._wait_for_work(lease, once))
            except OSError as error:
                self._retry_after(error, f"read and clean the index store {self.run}", once)
                continue
            if not running:
                return
            if version is not None:
                self._build(version, lease, once)

    def _wait_for_work(self, lease: Lease, once: bool) -> tuple[bool, Version | None]:
        """Wait for the next version to build; returns (False, None) if there will be none."""
        while not self.stop.is_set():
            lease.check()
            # Checked before looking for work, so that exports from before the end are still built.
            ended = self._no_more_exports(once)
            self._collect()
            version = self._next_version()
            self._remove_shards(except_for=version)
            if version is not None:
                return True, version
            if ended:
                break
            self.stop.wait(self.config.poll_s)
        return False, None

    def _no_more_exports(self, once: bool) -> bool:
        return once or (self.run / TRAINING_ENDED).exists()

    def _next_version(self) -> Version | None:
        """The encoder to build next, or None.

        Exports requested by a replay come first, in their order, then the newest encoder in the
        lineage of the newest attempt, if it has no index of this corpus and config yet.
        """
        lineage = Lineage.load(self.run)
        if lineage.current is None:
            return None
        usable = newest(self.run / "encoders", lineage, lineage.current)
        for step in requested_exports(self.run):
            version = next((version for version in usable if version.step == step), None)
            if version is not None and version not in self.skipped and not self._has_index(version):
                return version
        for version in usable:
            if version not in self.skipped:
                return None if self._has_index(version) else version
        return None

    def _has_index(self, encoder: Version) -> bool:
        return any(
            version.encoder == encoder and self._matches_config(version)
            for version in versions_in(self.run / "indexes")
        )

    def _matches_config(self, version: Version) -> bool:
        return matches_config(self.run / "indexes" / version.name, self.corpus, self.config, self.fusion)

    def _build(self, version: Version, lease: Lease, once: bool) -> None:
        """Build and publish the index of an encoder; log errors that can be retried."""
        try:
            build = VersionBuild(
                self.run, self.config, self.corpus, version, lease, self.workers, self.stop, self.log, self.fusion
            )
            build.build(self.load, lambda fraction_done: self._check_superseded(version, fraction_done))
            self.last_superseded, self.last_error = False, ""
        except Superseded as reason:
            self.last_superseded = True
            self.log(f"index of {version} dropped: {reason}")
        except Stopped:
            self.log(f"stopped while building the index of {version}; finished shards are kept")
        except NonFiniteEmbeddings as error:
            if once:
                raise
            self.skipped.add(version)
            self.log(f"skipped encoder {version}: {error}")
        except OSError as error:
            self._retry_after(error, f"build the index of {version}", once)

    def _retry_after(self, error: OSError, what: str, once: bool) -> None:
        """Log an error of the file system, such as a full disk, and wait before the next attempt;
        with `once`, raises UserError."""
        if once:
            raise UserError(
                f"cannot {what}: {error}; fix this and rerun the command (finished shards are kept)."
            ) from error
        if str(error) != self.last_error:
            self.last_error = str(error)
            self.log(f"cannot {what}, retrying every {_RETRY_S:g} s: {error}")
        self.workers.run_on_first(lambda: self.stop.wait(_RETRY_S))

    def _check_superseded(self, version: Version, fraction_done: float) -> None:
        """Raise Superseded if a newer export should be built instead.

        A build continues in spite of a newer export if the trainer has no index at all, if half of
        the shards are done, or if the last build was dropped too: otherwise exports that arrive
        faster than an index is built would starve the trainer. After training has ended there is no
        trainer to starve, and only the last export matters.
        """
        lineage = Lineage.load(self.run)
        assert lineage.current is not None
        if not lineage.allows(version, lineage.current):
            raise Superseded(f"attempt {lineage.current} abandoned it")
        if version.step in requested_exports(self.run):
            return
        latest = next(iter(newest(self.run / "encoders", lineage, lineage.current)), version)
        if latest in (version, *self.skipped):
            return
        if (self.run / TRAINING_ENDED).exists():
            raise Superseded(f"training has ended with {latest}")
        if self.last_superseded or fraction_done >= 0.5:
            return
        if any(self._matches_config(index) for index in newest(self.run / "indexes", lineage, lineage.current)):
            raise Superseded(f"{latest} is newer")

    def _collect(self) -> None:
        for version in self.collector.collect():
            self.log(f"{'encoder' if version.epoch is None else 'index'} {version} deleted")

    def _remove_shards(self, except_for: Version | None) -> None:
        """Remove the shards of all versions but one."""
        for version in versions_in(self.run / "refresher"):
            if version != except_for:
                remove_path(self.run / "refresher" / version.name)
