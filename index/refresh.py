"""The refresher: exported encoders in, published index versions out, through the file system alone.

It may be started, killed and restarted at any time: finished shards are kept, and one lease decides
who writes.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import faiss
import torch

from index.encode import SINGLE_PROCESS, Encoder, NonFiniteEmbeddings, load_encoder
from index.lease import Lease
from index.replay import requested_exports
from index.retention import GarbageCollector, process_name, remove_leftovers
from index.version_build import Stopped, Superseded, VersionBuild, is_current
from index.workers import WorkerGroup
from realm.errors import UserError
from realm.runtime.versions import Lineage, Version, newest, versions_in
from realm.training.sections import RefreshConfig

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus

TRAINING_ENDED = "training-ended"
"""File the trainer writes into the run folder when it will export nothing more."""

# What launchers tell their workers; a refresher that inherited it would join the trainer's process
# group.
_LAUNCHER_NAMES = {"RANK", "WORLD_SIZE", "NODE_RANK"}
_LAUNCHER_PREFIXES = ("MASTER_", "LOCAL_", "GROUP_", "ROLE_", "CROSS_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_")


_TRY_AGAIN_S = 1.0


def _say(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    pass


def refresh(
    run: Path,
    config: RefreshConfig,
    corpus: "PreparedCorpus",
    once: bool = False,
    log: Callable[[str], None] = _say,
    load: Callable[[Path], Encoder] = load_encoder,
    stop: threading.Event | None = None,
    workers: WorkerGroup = SINGLE_PROCESS,
) -> None:
    """Build an index for the newest exported encoder, again and again, until training has ended and
    nothing is left to do.

    `once`: end as soon as nothing is left to do. `stop`: set it to end early; SIGTERM and SIGINT do
    the same, when called from the main thread. Waits for its turn while another refresher holds the
    lease. `workers`: where several processes encode together, this one's place; all call this
    function with the same arguments, and the first of them holds the lease, builds and publishes.

    Raises UserError where no index can be built as configured (factory string, tokenizer), and
    LeaseLost where another refresher took over. An encoder that gives no usable embeddings is
    reported and passed over; with `once` it raises NonFiniteEmbeddings.
    """
    torch.set_num_threads(config.threads)
    faiss.omp_set_num_threads(config.threads)
    stop = stop or threading.Event()
    refresher = _Refresher(run, config, corpus, log if workers.is_first else _say_nothing, load, stop, workers)
    with _stopping_on_signals(stop), Lease(run / "refresher" / "lease", process_name(), config.lease_expiry_s) as lease:
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
    ) -> None:
        self.run = run
        self.config = config
        self.corpus = corpus
        self.log = log
        self.load = load
        self.stop = stop
        self.workers = workers
        self.collector = GarbageCollector(run, config.keep_last, config.grace_s)
        self.refused: set[Version] = set()
        self.dropped_last = False
        self.trouble = ""
        """What the file system answered last; said once."""

    def acquire(self, lease: Lease, once: bool) -> bool:
        """Wait for the lease; False where there is nothing left to hold it for."""
        waiting = False
        while not self._try_acquire(lease, once):
            if self.stop.is_set() or (self.is_over(once) and self.next_version() is None):
                return False
            if not waiting:
                waiting = True
                holder, expiry = lease.current_holder(), self.config.lease_expiry_s
                self.log(
                    f"refresher {holder} holds the lease; waiting until it ends, or for {expiry:g} s without a sign of life"
                )
            self.stop.wait(min(self.config.poll_s, self.config.lease_expiry_s / 4))
        for path in remove_leftovers(self.run):
            self.log(f"removed {path.name}, left over from a crash")
        return True

    def _try_acquire(self, lease: Lease, once: bool) -> bool:
        try:
            return lease.try_acquire()
        except OSError as error:
            if once or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(
                    f"no lease in {lease.folder}: {error}; mend that and give the command again."
                ) from error
            if str(error) != self.trouble:
                self.trouble = str(error)
                self.log(f"no lease yet, trying again: {error}")
            return False

    def run_loop(self, lease: Lease, once: bool) -> None:
        """What the first worker decides, all do: encode for a version, or end."""
        while True:
            going_on, version = self.workers.run_on_first(lambda: self._look(lease, once))
            if not going_on:
                return
            if version is not None:
                self._try_cycle(version, lease, once)

    def _look(self, lease: Lease, once: bool) -> tuple[bool, Version | None]:
        """The next version to build, waiting for one; (False, None) when there will be none."""
        while not self.stop.is_set():
            lease.check()
            over = self.is_over(once)  # before the look for work: what was exported before training ended is still done
            self._collect()
            version = self.next_version()
            self._remove_work(except_for=version)
            if version is not None:
                return True, version
            if over:
                break
            self.stop.wait(self.config.poll_s)
        return False, None

    def is_over(self, once: bool) -> bool:
        return once or (self.run / TRAINING_ENDED).exists()

    def next_version(self) -> Version | None:
        """The newest encoder of the newest attempt's lineage, if it has no index of this corpus
        and factory yet; before it, in their order, those that a trainer which follows a log is
        waiting for."""
        lineage = Lineage.load(self.run)
        if lineage.current is None:
            return None
        usable = newest(self.run / "encoders", lineage, lineage.current)
        for step in requested_exports(self.run):
            version = next((version for version in usable if version.step == step), None)
            if version is not None and version not in self.refused and not self._has_index(version):
                return version
        for version in usable:
            if version not in self.refused:
                return None if self._has_index(version) else version
        return None

    def _has_index(self, encoder: Version) -> bool:
        return any(
            version.encoder == encoder and self._is_current(version) for version in versions_in(self.run / "indexes")
        )

    def _is_current(self, version: Version) -> bool:
        return is_current(self.run / "indexes" / version.name, self.corpus, self.config)

    def _try_cycle(self, version: Version, lease: Lease, once: bool) -> None:
        try:
            build = VersionBuild(self.run, self.config, self.corpus, version, lease, self.workers, self.stop, self.log)
            build.build(self.load, lambda share_done: self._check_superseded(version, share_done))
            self.dropped_last, self.trouble = False, ""
        except Superseded as reason:
            self.dropped_last = True
            self.log(f"index of {version} dropped: {reason}")
        except Stopped:
            self.log(f"stopped while building the index of {version}; finished shards are kept")
        except NonFiniteEmbeddings as error:
            if once:
                raise
            self.refused.add(version)
            self.log(f"no index of {version}: {error}")
        except (
            OSError
        ) as error:  # a full disk, a file server that hiccups: what is finished stays, and the rest is tried again
            if once:
                raise UserError(
                    f"no index of {version}: {error}; finished shards are kept, so give the command again when that is mended."
                ) from error
            if str(error) != self.trouble:
                self.trouble = str(error)
                self.log(f"no index of {version} yet, trying again every {_TRY_AGAIN_S:g} s: {error}")
            self.workers.run_on_first(lambda: self.stop.wait(_TRY_AGAIN_S))

    def _check_superseded(self, version: Version, share_done: float) -> None:
        """Newest wins, unless the trainer has no index at all, more than half is done, or the last
        cycle was dropped too.

        Without the last condition exports that come faster than an index is built would starve the
        trainer. When training has ended there is no trainer left to starve: the last export alone
        counts.
        """
        lineage = Lineage.load(self.run)
        assert lineage.current is not None
        if not lineage.allows(version, lineage.current):
            raise Superseded(f"attempt {lineage.current} has abandoned it")
        if version.step in requested_exports(self.run):
            return
        latest = next(iter(newest(self.run / "encoders", lineage, lineage.current)), version)
        if latest in (version, *self.refused):
            return
        if (self.run / TRAINING_ENDED).exists():
            raise Superseded(f"training has ended with {latest}")
        if self.dropped_last or share_done >= 0.5:
            return
        if any(self._is_current(index) for index in newest(self.run / "indexes", lineage, lineage.current)):
            raise Superseded(f"{latest} is newer")

    def _collect(self) -> None:
        lineage = Lineage.load(self.run)
        if lineage.current is not None:
            for version in self.collector.collect(lineage, lineage.current):
                self.log(f"{'encoder' if version.epoch is None else 'index'} {version} deleted")

    def _remove_work(self, except_for: Version | None) -> None:
        for version in versions_in(self.run / "refresher"):
            if version != except_for:
                shutil.rmtree(self.run / "refresher" / version.name)


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; only the main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_refresher(run: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Start `realm refresh --run RUN` as a fresh process with its output in `log_path` and
    without the launcher's variables."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        command = [sys.executable, "-m", "realm", "refresh", "--run", str(run)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
