"""Start, kill and check the processes of the fault benchmark."""

import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from index.bench.fault_processes import PHASE_NUMBERS, FaultSetup, run_refresher, run_silently, run_trainer
from index.retention import ASIDE, referenced_by_checkpoints
from index.search import IndexRefused, PassageIndex
from realm.runtime.versions import Lineage, Version, versions_in


@dataclass
class Report:
    """Number of kills by process and phase, figures, and violations of the guarantees."""

    kills: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


class Supervisor:
    """Starts and kills the processes of a setup, and checks its index store."""

    def __init__(self, setup: FaultSetup, seed: int) -> None:
        self.setup, self.rng, self.report = setup, random.Random(seed), Report()
        self.context = multiprocessing.get_context("fork")
        self.seen: set[Version] = set()
        """Valid versions found by `check_store` so far."""
        self.attempt: int | None = None
        """The newest attempt at the last `check_store`."""
        self.newest: Version | None = None
        """The newest valid version found in that attempt's lineage since it began."""
        self.num_started = 0

    def start(self, kind: str, **options: Any) -> Any:
        """Start a trainer or a refresher."""
        self.num_started += 1
        self.setup.phase[kind].value = 0
        arguments = (run_trainer, self.setup, self.num_started) if kind == "trainer" else (run_refresher, self.setup)
        return self.fork(*arguments, **options)

    def fork(self, target: Callable[..., None], *arguments: Any, **options: Any) -> Any:
        """Run `target` in a forked process, without output."""
        process = self.context.Process(target=run_silently, args=(target, *arguments), kwargs=options, daemon=True)
        process.start()
        return process

    def kill(self, process: Any, kind: str, phase: str, timeout_s: float = 3.0) -> None:
        """Send SIGKILL during `phase`, or after `timeout_s` in any phase."""
        deadline = time.monotonic() + timeout_s
        while (
            self.setup.phase[kind].value != PHASE_NUMBERS[phase] and time.monotonic() < deadline and process.is_alive()
        ):
            time.sleep(0.0005)
        time.sleep(self.rng.random() * 0.008)
        killed_in = self.setup.phase[kind].value
        process.kill()
        process.join()
        names = {number: name for name, number in PHASE_NUMBERS.items()}
        self.report.kills[f"{kind}, {names.get(killed_in, 'between')}"] += 1

    def check_store(self) -> None:
        """Report a violation if a visible version is invalid, if a checkpoint references a version
        that is lost, or if the newest version that the newest attempt could use is lost.

        After a resume from an earlier checkpoint, versions that had been replaced before may be
        gone: only those seen in the same attempt count.
        """
        run = self.setup.run
        references = referenced_by_checkpoints(run)
        lineage = Lineage.load(run)
        if lineage.current != self.attempt:
            self.attempt, self.newest = lineage.current, None
        for version in versions_in(run / "indexes"):
            reason = self._refused(version)
            if reason is not None:
                self.report.violations.append(f"an invalid version was visible: {reason}")
                continue
            self.seen.add(version)
            if lineage.current is not None and lineage.allows(version, lineage.current):
                self.newest = version if self.newest is None else max(self.newest, version)
        lost = [
            f"{reference.index}, which the checkpoint of step {reference.step} references, is lost"
            for reference in references
            if not self._is_present(reference.index)
        ]
        if self.newest is not None and not self._is_present(self.newest):
            lost.append(f"{self.newest} was published and is lost")
        # An attempt that began in the meantime may have abandoned it.
        if lost and Lineage.load(run).current == lineage.current:
            self.report.violations += lost

    def _refused(self, version: Version) -> str | None:
        """Why a visible version cannot be opened; None if it can, or if it was collected."""
        folder = self.setup.run / "indexes" / version.name
        reason = None
        for _ in range(3):  # a collector may move it aside and back
            try:
                PassageIndex.open(folder, self.setup.corpus.fingerprint)
                return None
            except (IndexRefused, OSError, RuntimeError) as error:
                reason = str(error)
            if not folder.exists():
                return None
            time.sleep(0.05)
        return reason

    def _is_present(self, version: Version) -> bool:
        """Whether a version is in the store, or was moved aside by a collector that was killed."""
        indexes = self.setup.run / "indexes"
        return any((indexes / name).exists() for name in (version.name, ASIDE + version.name, version.name))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes computing, so that the tested ones are slowed down at random."""
    processes = [multiprocessing.get_context("fork").Process(target=_compute, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _compute() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        pass
