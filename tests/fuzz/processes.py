"""Running fuzz targets in processes, so that an input that kills one or cannot be interrupted is
reported."""

import multiprocessing
import os
import resource
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.runner import Report, run_target
from tests.fuzz.targets import TARGETS, Target

STUCK_S = 60.0
"""A process whose case does not end within this time is killed."""
ADDRESS_SPACE = 4 << 30
"""Bytes that a process may allocate on top of what its imports take."""
MAX_DEATHS = 10


def run_in_processes(target: Target, seed: int, numbers: range) -> tuple[Report, list[tuple[int, str]]]:
    """Run the cases of a target in a process, and those after a case that ended it in another one.

    Returns the report and, for each case that ended a process, its number and the reason. Stops
    after `MAX_DEATHS`.
    """
    total = Report(target.name)
    died: list[tuple[int, str]] = []
    while numbers and len(died) < MAX_DEATHS:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(target.run.__module__, target.name, seed, numbers, theirs)
        )
        process.start()
        theirs.close()
        number, report, why = numbers.start, Report(target.name), None
        try:
            while number >= 0:
                if not ours.poll(STUCK_S):
                    process.kill()
                    why = f"no end within {STUCK_S:.0f} s; the process was killed"
                    break
                number, report = ours.recv()
        except EOFError:
            process.join()
            why = f"the process died with exit status {process.exitcode}"
        process.join()
        for field in ("cases", "accepted", "refused", "skipped", "failures"):
            setattr(total, field, getattr(total, field) + getattr(report, field))
        if report.slowest_s > total.slowest_s:
            total.slowest_s, total.slowest = report.slowest_s, report.slowest
        if why is None:
            break
        died.append((number, why))
        numbers = range(number + 1, numbers.stop)
    return total, died


def _work(module: str, name: str, seed: int, numbers: range, connection: Connection) -> None:
    """Run the cases, and send the number before and the report after each."""
    import_module(module)  # which registers the target
    with open(os.devnull, "w") as nowhere:  # libraries print warnings about damaged input
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESS_SPACE, resource.RLIM_INFINITY))
    for number, report in run_target(TARGETS[name], seed, numbers):
        connection.send((number, report))
