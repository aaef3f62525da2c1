"""Start, kill and check the processes of the fault benchmark."""

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from index.bench.fault_processes import PHASE_NUMBERS, FaultSetup, run_refresher, run_silently, run_trainer
from index.search import IndexRefused, PassageIndex
from realm.runtime.versions import Lineage, Version, newest, versions_in


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
        """Report a violation if a visible version is invalid, or if the newest one seen before is
        lost."""
        run = self.setup.run
        lineage = Lineage.load(run)
        for version in versions_in(run / "indexes"):
            folder = run / "indexes" / version.name
            try:
                PassageIndex.open(folder, self.setup.corpus.fingerprint)
                self.seen.add(version)
            except IndexRefused as error:
                if folder.exists():
                    self.report.violations.append(f"an invalid version was visible: {error}")
        if lineage.current is not None:
            usable = [version for version in self.seen if lineage.allows(version, lineage.current)]
            present = newest(run / "indexes", lineage, lineage.current)
            best = max(usable, key=lambda version: (version.step, version.attempt, version.epoch or 0), default=None)
            if best is not None and (not present or (present[0].step, present[0].attempt) < (best.step, best.attempt)):
                self.report.violations.append(f"{best} was published and is lost")
