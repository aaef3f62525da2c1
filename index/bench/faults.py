"""`realm bench faults`: what the index store survives, on a tiny run of its own with a real corpus,
encoder, refresher and watcher.

A trainer exports and follows, a refresher builds; both are killed with SIGKILL again and again,
each time in the middle of a chosen phase. After each kill every version on disk must be whole, none
committed may be lost, and every index that was served must hold what its encoder gives. Then bits
are flipped and files cut short, a lease holder is frozen and woken, two refreshers start at once,
and a disk runs full.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index.admin import collect_garbage
from index.bench.fault_processes import (
    CONFIG,
    PASSAGES,
    PHASE_NUMBERS,
    PHASES,
    Scene,
    export,
    run_refresher,
    run_trainer,
    silently,
)
from index.live import remove_export_leftovers
from index.refresh import TRAINING_ENDED
from index.search import IndexRefused, PassageIndex
from realm.runtime.telemetry import console, print_table, progress
from realm.runtime.versions import Lineage, Version, newest, start_attempt, versions_in


@dataclass
class Report:
    """What was done and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


class Supervisor:
    """Starts, kills and checks."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.rng, self.report = scene, random.Random(seed), Report()
        self.context = multiprocessing.get_context("fork")
        self.seen: set[Version] = set()
        self.started = 0

    def start(self, kind: str, **options: Any) -> Any:
        self.started += 1
        self.scene.phase[kind].value = 0
        arguments = (run_trainer, self.scene, self.started) if kind == "trainer" else (run_refresher, self.scene)
        return self.fork(*arguments, **options)

    def fork(self, target: Callable[..., None], *arguments: Any, **options: Any) -> Any:
        process = self.context.Process(target=silently, args=(target, *arguments), kwargs=options, daemon=True)
        process.start()
        return process

    def kill(self, process: Any, kind: str, phase: str, timeout_s: float = 3.0) -> None:
        """SIGKILL within `phase`, or wherever it is after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (
            self.scene.phase[kind].value != PHASE_NUMBERS[phase] and time.monotonic() < deadline and process.is_alive()
        ):
            time.sleep(0.0005)
        time.sleep(self.rng.random() * 0.008)
        at = self.scene.phase[kind].value
        process.kill()
        process.join()
        names = {number: name for name, number in PHASE_NUMBERS.items()}
        self.report.kills[f"{kind}, {names.get(at, 'between')}"] += 1

    def check_store(self) -> None:
        """Every version is whole, and the newest that was there is there."""
        run = self.scene.run
        lineage = Lineage.load(run)
        for version in versions_in(run / "indexes"):
            folder = run / "indexes" / version.name
            try:
                PassageIndex.open(folder, self.scene.corpus.fingerprint)
                self.seen.add(version)
            except IndexRefused as error:
                if folder.exists():
                    self.report.violations.append(f"a broken version was visible: {error}")
        if lineage.current is not None:
            usable = [version for version in self.seen if lineage.allows(version, lineage.current)]
            there = newest(run / "indexes", lineage, lineage.current)
            best = max(usable, key=lambda version: (version.step, version.attempt, version.epoch or 0), default=None)
            if best is not None and (not there or (there[0].step, there[0].attempt) < (best.step, best.attempt)):
                self.report.violations.append(f"{best} was committed and is lost")

    def kill_at_random(self, kills: int) -> None:
        """The main part: `kills` times, one of the two processes."""
        processes = {kind: self.start(kind) for kind in PHASES}
        with progress("kill -9", kills, unit="kill", every_s=10.0) as ticker:
            for number in range(kills):
                kind = self.rng.choice(list(PHASES))
                self.kill(processes[kind], kind, self.rng.choice(PHASES[kind]))
                self.check_store()
                processes[kind] = self.start(kind)
                ticker.update(number + 1)
        for kind, process in processes.items():
            self.kill(process, kind, PHASES[kind][0], 0.0)

    def settle(self) -> None:
        """When all is dead: one refresher finishes, one collection, and nothing is left over."""
        run = self.scene.run
        refresher_kills = sum(count for name, count in self.report.kills.items() if name.startswith("refresher"))
        (run / TRAINING_ENDED).touch()
        remove_export_leftovers(run)
        last = self.start("refresher")
        last.join(60)
        if last.exitcode != 0:
            self.report.violations.append("the last refresher did not end by itself")
        collect_garbage(run, CONFIG, 0.0, False, lambda line: None)
        leftovers = [
            str(path) for folder in ("indexes", "encoders", "refresher") for path in (run / folder).rglob(".tmp-*")
        ]
        self.report.violations += [f"left over: {path}" for path in leftovers]
        self.check_store()
        shards = Counter(self.scene.noted("shards"))
        redone = sum(count - 1 for count in shards.values())
        if redone > refresher_kills:
            self.report.violations.append(
                f"{redone} shards were encoded again after {refresher_kills} kills of the refresher"
            )
        self.report.figures |= {
            "versions committed": len(self.seen),
            "indexes served and compared": len(self.scene.noted("served")),
            "shards encoded": sum(shards.values()),
            "shards encoded again": redone,
            "kills of the refresher": refresher_kills,
            "left over after collection": len(leftovers),
        }

    def damage(self, flips: int) -> None:
        """Random bit flips and cuts over all files of a version: refused, or provably harmless."""
        run = self.scene.run
        source = run / "indexes" / versions_in(run / "indexes")[-1].name
        refused: Counter[str] = Counter()
        with tempfile.TemporaryDirectory(dir=run.parent) as place:
            folder = Path(shutil.copytree(source, Path(place) / source.name))
            files = sorted(file for file in folder.iterdir())
            sizes = [file.stat().st_size for file in files]
            sound = PassageIndex.open(folder, self.scene.corpus.fingerprint).embeddings(np.arange(PASSAGES))
            for number in range(flips):
                file = files[number % len(files)] if number % 2 else self.rng.choices(files, sizes)[0]
                content = bytearray(file.read_bytes())
                changed = bytearray(content)
                cut = number % 10 == 9
                if cut:
                    changed = changed[: self.rng.randrange(len(content))]
                else:
                    changed[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
                file.write_bytes(bytes(changed))
                kind = "cut short" if cut else "bit flips"
                try:
                    index = PassageIndex.open(folder, self.scene.corpus.fingerprint)
                    if np.array_equal(index.embeddings(np.arange(PASSAGES)), sound):
                        refused[f"{kind}, harmless"] += 1
                    else:
                        self.report.violations.append(f"a {kind} in {file.name} was served")
                except IndexRefused:
                    refused[f"{kind}, refused"] += 1
                except Exception as error:
                    self.report.violations.append(f"{kind} in {file.name} ended its reader: {type(error).__name__}")
                file.write_bytes(bytes(content))
        self.report.figures |= dict(refused)

    def freeze(self, times: int) -> None:
        """A lease holder is stopped in the middle, loses the lease, and wakes."""
        scene, run, survived = self.scene, self.scene.run, 0
        (run / TRAINING_ENDED).unlink(missing_ok=True)
        for _ in range(times):
            attempt = start_attempt(run)
            export(scene, Version(attempt, 1))
            frozen = self.start("refresher")
            while (
                scene.phase["refresher"].value != PHASE_NUMBERS[self.rng.choice(PHASES["refresher"][:3])]
                and frozen.is_alive()
            ):
                time.sleep(0.0005)
            os.kill(frozen.pid, signal.SIGSTOP)
            other = self.start("refresher", once=True)
            other.join(60)
            os.kill(frozen.pid, signal.SIGCONT)
            frozen.join(10)
            built = [version for version in versions_in(run / "indexes") if version.attempt == attempt]
            if len(built) != 1:
                self.report.violations.append(f"after a freeze encoder a{attempt:02d} has {len(built)} indexes")
            elif frozen.is_alive():
                self.report.violations.append("a refresher that lost its lease went on")
            else:
                survived += 1
            frozen.kill()
            frozen.join()
            self.check_store()
        self.report.figures["lease holders frozen, taken over and woken"] = survived

    def two_at_once(self, versions: int) -> None:
        """Two refreshers from the start: every encoder is indexed once."""
        scene, run = self.scene, self.scene.run
        attempt = start_attempt(run)
        pair = [self.start("refresher", config=CONFIG) for _ in range(2)]
        epochs: dict[Version, set[Version]] = {}
        for step in range(1, versions + 1):
            export(scene, Version(attempt, step))
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                for version in versions_in(run / "indexes"):
                    epochs.setdefault(version.encoder, set()).add(version)
                if Version(attempt, step) in epochs:
                    break
                time.sleep(0.005)
            else:
                self.report.violations.append(f"two refreshers built no index of {Version(attempt, step)}")
        for process in pair:
            process.terminate()
            process.join(20)
            if process.is_alive() or process.exitcode != 0:
                self.report.violations.append("a refresher did not end on SIGTERM")
        twice = [version for version, built in epochs.items() if version.attempt == attempt and len(built) > 1]
        self.report.violations += [f"{version} was built twice" for version in twice]
        self.report.figures["versions of two refreshers at once"] = versions

    def full_disk(self) -> None:
        """The store on a file system with no room: nothing half-published; when room is made, it
        goes on."""
        scene, run = self.scene, self.scene.run
        small = run.parent / "small"
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True)
        if mounted.returncode:
            self.report.figures["full disk"] = "not tried: mounting a small file system is not allowed here"
            return
        try:
            inner = Scene(small / "run", scene.notes, scene.corpus, scene.retriever, scene.tokenizer, scene.phase)
            inner.run.mkdir()
            start_attempt(inner.run)
            with suppress(OSError):
                export(inner, Version(1, 1))
            exported = versions_in(inner.run / "encoders")
            self.report.figures["full disk, exports"] = "refused whole" if not exported else "fits"
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True, capture_output=True)
            remove_export_leftovers(inner.run)
            export(inner, Version(1, 2))
            filler = small / "filler"
            room = shutil.disk_usage(small).free
            filler.write_bytes(bytes(max(0, room - 16_384)))
            process = self.fork(run_refresher, inner)
            time.sleep(3.0)
            if versions_in(inner.run / "indexes") or not process.is_alive():
                self.report.violations.append("a full disk ended the refresher, or an index was published on it")
            if list((inner.run / "indexes").glob(".tmp-*")):
                self.report.violations.append("a full disk left something half-written")
            filler.unlink()
            deadline = time.monotonic() + 30
            while not versions_in(inner.run / "indexes") and time.monotonic() < deadline:
                time.sleep(0.05)
            if not versions_in(inner.run / "indexes"):
                self.report.violations.append("the refresher did not go on when the disk had room again")
            process.terminate()
            process.join(20)
            self.report.figures["full disk, refresher"] = "waited, and went on when there was room"
        finally:
            subprocess.run(["umount", "-l", str(small)], capture_output=True)


def bench_faults(kills: int, flips: int, seed: int, json_file: Path | None) -> Report:
    """Run everything, print one table; the report also goes to `json_file`."""
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="realm-faults-") as folder:
        scene = Scene.build(Path(folder))
        scene.run.mkdir()
        supervisor = Supervisor(scene, seed)
        supervisor.kill_at_random(kills)
        supervisor.settle()
        supervisor.damage(flips)
        supervisor.freeze(5)
        supervisor.two_at_once(5)
        supervisor.full_disk()
        report = supervisor.report
        report.violations += scene.noted("violations")
    report.figures["seconds"] = round(time.monotonic() - began, 1)
    rows: list[list[object]] = [[f"kill -9: {name}", count] for name, count in sorted(report.kills.items())]
    rows += [["kill -9 in all", sum(report.kills.values())], *([name, value] for name, value in report.figures.items())]
    print_table("Faults", ["what", "number"], [*rows, ["violations", len(report.violations)]])
    for line in report.violations:
        console.print(f"  VIOLATION: {line}")
    if json_file is not None:
        content = {
            "kills": dict(report.kills),
            "figures": report.figures,
            "violations": report.violations,
            "seed": seed,
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    return report
