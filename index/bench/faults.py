"""`realm bench faults`: inject faults into the index store of a tiny run, which has a real corpus,
encoder, refresher and watcher.

A trainer exports and follows the index, a refresher builds it; both are repeatedly killed with
SIGKILL during a chosen phase. After each kill, every version on disk must be valid, neither the
newest version nor one that a checkpoint references may be lost, and every served index must contain
its encoder's embeddings. Then files are
corrupted by flipped bits and truncation, a lease holder is suspended and resumed, two refreshers
start at once, and the disk fills up.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from index.admin import collect_garbage
from index.bench.fault_processes import (
    CONFIG,
    NUM_PASSAGES,
    PHASE_NUMBERS,
    PHASES,
    FaultSetup,
    export,
    run_refresher,
)
from index.bench.fault_supervisor import Report, Supervisor, busy_processes
from index.live import remove_export_leftovers
from index.refresh import TRAINING_ENDED
from index.search import IndexRefused, PassageIndex
from realm.runtime.telemetry import console, print_table, progress
from realm.runtime.versions import Lineage, Version, newest, start_attempt, versions_in


def kill_at_random(supervisor: Supervisor, kills: int) -> None:
    """Kill one of the two processes `kills` times, each in a random phase."""
    processes = {kind: supervisor.start(kind) for kind in PHASES}
    with progress("kill -9", kills, unit="kill", every_s=10.0) as ticker:
        for number in range(kills):
            kind = supervisor.rng.choice(list(PHASES))
            supervisor.kill(processes[kind], kind, supervisor.rng.choice(PHASES[kind]))
            supervisor.check_store()
            processes[kind] = supervisor.start(kind)
            ticker.update(number + 1)
    for kind, process in processes.items():
        supervisor.kill(process, kind, PHASES[kind][0], 0.0)


def check_recovery(supervisor: Supervisor) -> None:
    """After all kills: one refresher and one garbage collection must leave no temporary files."""
    run, report = supervisor.setup.run, supervisor.report
    refresher_kills = sum(count for name, count in report.kills.items() if name.startswith("refresher"))
    (run / TRAINING_ENDED).touch()
    remove_export_leftovers(run)
    lineage = Lineage.load(run)
    if lineage.current is None or not newest(run / "encoders", lineage, lineage.current):
        export(supervisor.setup, Version(start_attempt(run), 1))  # the last trainer was killed before its export
    last = supervisor.start("refresher")
    last.join(60)
    if last.exitcode != 0:
        report.violations.append("the last refresher did not exit by itself")
    collect_garbage(run, CONFIG, 0.0, False, lambda line: None)
    leftovers = [
        str(path) for folder in ("indexes", "encoders", "refresher") for path in (run / folder).rglob(".tmp-*")
    ]
    report.violations += [f"left over: {path}" for path in leftovers]
    supervisor.check_store()
    num_encoded, redone = count_shards(supervisor.setup.recorded("shards"))
    if redone > refresher_kills:
        report.violations.append(f"{redone} shards were encoded again after {refresher_kills} kills of the refresher")
    report.figures |= {
        "versions committed": len(supervisor.seen),
        "indexes served and compared": len(supervisor.setup.recorded("served")),
        "shards encoded": num_encoded,
        "shards encoded again": redone,
        "kills of the refresher": refresher_kills,
        "left over after collection": len(leftovers),
    }


def count_shards(records: list[str]) -> tuple[int, int]:
    """Number of shards encoded, and of those that had been encoded before for the same build.

    A version that was published, replaced, collected and needed once more after a resume from an
    earlier checkpoint is another build.
    """
    encoded: dict[str, Counter[str]] = {}
    num_encoded = num_redone = 0
    for record in records:
        encoder, shard = record.split("/")
        if shard == "published":
            encoded.pop(encoder, None)
            continue
        counts = encoded.setdefault(encoder, Counter())
        num_encoded, num_redone = num_encoded + 1, num_redone + (counts[shard] > 0)
        counts[shard] += 1
    return num_encoded, num_redone


def corrupt_files(supervisor: Supervisor, num_corruptions: int) -> None:
    """Flip random bits in and truncate the files of a version: it must be refused, or its
    embeddings must be unchanged."""
    run, rng, fingerprint = supervisor.setup.run, supervisor.rng, supervisor.setup.corpus.fingerprint
    violations = supervisor.report.violations
    source = run / "indexes" / versions_in(run / "indexes")[-1].name
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=run.parent) as temporary:
        folder = Path(shutil.copytree(source, Path(temporary) / source.name))
        files = sorted(folder.iterdir())
        sizes = [file.stat().st_size for file in files]
        expected = PassageIndex.open(folder, fingerprint).embeddings(np.arange(NUM_PASSAGES))
        for number in range(num_corruptions):
            file = files[number % len(files)] if number % 2 else rng.choices(files, sizes)[0]
            content = bytearray(file.read_bytes())
            changed = bytearray(content)
            truncate = number % 10 == 9
            if truncate:
                changed = changed[: rng.randrange(len(content))]
            else:
                changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(bytes(changed))
            kind = "cut short" if truncate else "bit flips"
            try:
                index = PassageIndex.open(folder, fingerprint)
                if np.array_equal(index.embeddings(np.arange(NUM_PASSAGES)), expected):
                    outcomes[f"{kind}, harmless"] += 1
                else:
                    violations.append(f"{kind} in {file.name}: the index was served")
            except IndexRefused:
                outcomes[f"{kind}, refused"] += 1
            except Exception as error:
                violations.append(f"{kind} in {file.name}: the reader failed with {type(error).__name__}")
            file.write_bytes(bytes(content))
    supervisor.report.figures |= dict(outcomes)


def suspend_lease_holder(supervisor: Supervisor, times: int) -> None:
    """Suspend a lease holder during its work (SIGSTOP), let it lose the lease, and resume it."""
    setup, run, survived = supervisor.setup, supervisor.setup.run, 0
    (run / TRAINING_ENDED).unlink(missing_ok=True)
    for _ in range(times):
        attempt = start_attempt(run)
        export(setup, Version(attempt, 1))
        suspended = supervisor.start("refresher")
        while (
            setup.phase["refresher"].value != PHASE_NUMBERS[supervisor.rng.choice(PHASES["refresher"][:3])]
            and suspended.is_alive()
        ):
            time.sleep(0.0005)
        os.kill(suspended.pid, signal.SIGSTOP)
        other = supervisor.start("refresher", once=True)
        other.join(60)
        os.kill(suspended.pid, signal.SIGCONT)
        suspended.join(10)
        built = [version for version in versions_in(run / "indexes") if version.attempt == attempt]
        if len(built) != 1:
            supervisor.report.violations.append(
                f"after a suspension the encoder of attempt {attempt} has {len(built)} indexes, expected 1"
            )
        elif suspended.is_alive():
            supervisor.report.violations.append("a refresher that lost its lease kept running")
        else:
            survived += 1
        suspended.kill()
        suspended.join()
        supervisor.check_store()
    supervisor.report.figures["lease holders suspended, replaced and resumed"] = survived


def run_two_refreshers(supervisor: Supervisor, num_versions: int) -> None:
    """Run two refreshers from the start: each encoder must be indexed exactly once."""
    setup, run = supervisor.setup, supervisor.setup.run
    attempt = start_attempt(run)
    pair = [supervisor.start("refresher", config=CONFIG) for _ in range(2)]
    epochs: dict[Version, set[Version]] = {}
    for step in range(1, num_versions + 1):
        export(setup, Version(attempt, step))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for version in versions_in(run / "indexes"):
                epochs.setdefault(version.encoder, set()).add(version)
            if Version(attempt, step) in epochs:
                break
            time.sleep(0.005)
        else:
            supervisor.report.violations.append(f"two refreshers did not build an index of {Version(attempt, step)}")
    for process in pair:
        process.terminate()
        process.join(20)
        if process.is_alive() or process.exitcode != 0:
            supervisor.report.violations.append("a refresher did not exit on SIGTERM")
    twice = [version for version, built in epochs.items() if version.attempt == attempt and len(built) > 1]
    supervisor.report.violations += [f"{version} was built twice" for version in twice]
    supervisor.report.figures["versions built by two refreshers at the same time"] = num_versions


def fill_disk(supervisor: Supervisor) -> None:
    """Fill the store's file system: no partial version may be published, and the refresher must
    continue when space is available again."""
    setup, report = supervisor.setup, supervisor.report
    small = setup.run.parent / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        report.figures["full disk"] = "skipped: no permission to mount a small file system"
        return
    try:
        inner = FaultSetup(small / "run", setup.records, setup.corpus, setup.retriever, setup.tokenizer, setup.phase)
        inner.run.mkdir()
        start_attempt(inner.run)
        with suppress(OSError):
            export(inner, Version(1, 1))
        exported = versions_in(inner.run / "encoders")
        report.figures["full disk, exports"] = "failed without a partial version" if not exported else "fits"
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True, capture_output=True)
        remove_export_leftovers(inner.run)
        export(inner, Version(1, 2))
        filler = small / "filler"
        free = shutil.disk_usage(small).free
        filler.write_bytes(bytes(max(0, free - 16_384)))
        process = supervisor.fork(run_refresher, inner)
        time.sleep(3.0)
        if versions_in(inner.run / "indexes") or not process.is_alive():
            report.violations.append("the refresher exited on a full disk, or published an index on it")
        if list((inner.run / "indexes").glob(".tmp-*")):
            report.violations.append("a full disk left partially written files")
        filler.unlink()
        deadline = time.monotonic() + 30
        while not versions_in(inner.run / "indexes") and time.monotonic() < deadline:
            time.sleep(0.05)
        if not versions_in(inner.run / "indexes"):
            report.violations.append("the refresher did not continue when the disk had space again")
        process.terminate()
        process.join(20)
        report.figures["full disk, refresher"] = "waited, and continued when there was space"
    finally:
        subprocess.run(["umount", "-l", str(small)], capture_output=True)


def bench_faults(kills: int, flips: int, seed: int, num_seeds: int, load: int, json_file: Path | None) -> list[Report]:
    """Inject all faults, once per seed from `seed` on, and print a table of each.

    `load`: number of processes that compute at the same time. Writes the reports to `json_file`
    too.
    """
    torch.set_num_threads(1)
    reports = []
    with busy_processes(load):
        for number in range(seed, seed + num_seeds):
            reports.append(inject_faults(kills, flips, number))
            _print_report(reports[-1], number)
    if num_seeds > 1:
        rows: list[list[object]] = [
            [seed + number, sum(report.kills.values()), len(report.violations)] for number, report in enumerate(reports)
        ]
        rows.append(["all", *(sum(int(str(row[column])) for row in rows) for column in (1, 2))])
        print_table(f"Faults, {load} processes beside", ["seed", "kills", "violations"], rows)
    if json_file is not None:
        runs = [{"seed": seed + number, **vars(report)} for number, report in enumerate(reports)]
        json_file.write_text(json.dumps({"load": load, "runs": runs}, indent=1) + "\n")
    return reports


def inject_faults(kills: int, flips: int, seed: int) -> Report:
    """Inject all faults into a new run."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="realm-faults-") as folder:
        setup = FaultSetup.build(Path(folder))
        setup.run.mkdir()
        supervisor = Supervisor(setup, seed)
        kill_at_random(supervisor, kills)
        check_recovery(supervisor)
        corrupt_files(supervisor, flips)
        suspend_lease_holder(supervisor, 5)
        run_two_refreshers(supervisor, 5)
        fill_disk(supervisor)
        report = supervisor.report
        report.violations += setup.recorded("violations")
    report.figures["seconds"] = round(time.monotonic() - start, 1)
    return report


def _print_report(report: Report, seed: int) -> None:
    rows: list[list[object]] = [[f"kill -9: {name}", count] for name, count in sorted(report.kills.items())]
    rows += [["kill -9, total", sum(report.kills.values())], *([name, value] for name, value in report.figures.items())]
    print_table(f"Faults, seed {seed}", ["event", "count"], [*rows, ["violations", len(report.violations)]])
    for line in report.violations:
        console.print(f"  VIOLATION: {line}")
