"""Running the cases of a target: outcomes, time and memory, and the smallest failing input."""

import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from realm.errors import UserError
from tests.fuzz.targets import Case, Target

LIMIT_S = 1.0
"""Most processor time that one input may take."""
LIMIT_BYTES = 512 << 20
"""Most memory by which one input may raise the peak of the process."""
LONGEST_MESSAGE = 6_000
"""Most characters of an error message: it must not repeat the input."""
_INTERRUPT_S = 5.0
_SHRINK_S = 10.0


class _TooSlow(BaseException):
    """Raised in a case that runs for `_INTERRUPT_S` of processor time."""


@dataclass(frozen=True)
class Failure:
    """A case that did not end as it must."""

    number: int
    why: str
    """First line: what happened and where; the traceback follows."""
    case: Case

    @property
    def kind(self) -> str:
        """What happened, without the details that depend on the input."""
        return self.why.split(":", 1)[0] + self.why.partition(" at ")[2].split("\n")[0]


@dataclass
class Report:
    """Outcomes of the cases of one target."""

    target: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    skipped: int = 0
    """Records that were skipped and counted in accepted inputs."""
    failures: list[Failure] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: int = -1
    """Number of the slowest case."""


def case_of(target: Target, seed: int, number: int) -> Case:
    """Case `number` of a target; depends on nothing else."""
    return target.generate(Random(f"{seed} {target.name} {number}"))


def run_case(target: Target, case: Case, folder: Path) -> tuple[int | None, float, str | None]:
    """Run one case in an empty folder.

    Returns the number of skipped records (None if it was refused), the processor time in seconds,
    and why it failed, if it did.
    """
    before, start = _peak_bytes(), time.process_time()
    skipped: int | None = None
    why = None
    try:
        with _interrupted_after(_INTERRUPT_S):
            skipped = target.run(case, folder)
    except UserError as error:
        if len(str(error)) > LONGEST_MESSAGE:
            why = f"a message of {len(str(error)):,} characters: {str(error)[:200]!r}"
    except _TooSlow as error:
        why = f"interrupted after {_INTERRUPT_S:.0f} s at {_place(error)}"
    except (SystemExit, Exception) as error:
        lines = "".join(traceback.format_exception(error, limit=-6))
        why = f"{type(error).__name__}: {str(error)[:200]} at {_place(error)}\n{lines[:3_000]}"
    seconds = time.process_time() - start
    if why is None and (grown := _peak_bytes() - before) > LIMIT_BYTES:
        why = f"peak memory grew: by {grown >> 20} MiB"
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return skipped, seconds, why


def run_target(
    target: Target, seed: int, numbers: Iterator[int] | range, shrink: bool = True
) -> Iterator[tuple[int, Report]]:
    """Run the cases with these numbers; yields the number before, and the report after each."""
    report = Report(target.name)
    with tempfile.TemporaryDirectory(prefix="realm-fuzz-") as name:
        folder = Path(name)
        for number in numbers:
            yield number, report
            case = case_of(target, seed, number)
            skipped, seconds, why = run_case(target, case, folder)
            if why is None and seconds > LIMIT_S:  # once more: the first run of a code path imports modules
                skipped, seconds, why = run_case(target, case, folder)
                if why is None and seconds > LIMIT_S:
                    why = f"too slow: {seconds:.1f} s of processor time"
            report.cases += 1
            if seconds > report.slowest_s:
                report.slowest_s, report.slowest = seconds, number
            if why is not None:
                failure = Failure(number, why, case)
                known = any(failure.kind == other.kind for other in report.failures)
                report.failures.append(_shrunk(target, failure, folder) if shrink and not known else failure)
            elif skipped is None:
                report.refused += 1
            else:
                report.accepted += 1
                report.skipped += skipped
        yield -1, report


def _shrunk(target: Target, failure: Failure, folder: Path) -> Failure:
    """Remove parts of the content as long as it fails in the same way, for up to `_SHRINK_S`."""
    deadline = time.monotonic() + _SHRINK_S
    content, size = failure.case.content, max(1, len(failure.case.content) // 2)
    while size:
        start = 0
        while start < len(content):
            if time.monotonic() > deadline:
                return failure
            case = replace(failure.case, content=content[:start] + content[start + size :])
            why = run_case(target, case, folder)[2]
            smaller = None if why is None else Failure(failure.number, why, case)
            if smaller is not None and smaller.kind == failure.kind:
                failure, content = smaller, case.content
            else:
                start += size
        size //= 2
    return failure


def _place(error: BaseException) -> str:
    """The innermost line of this repository in a traceback."""
    root = str(Path(__file__).parents[2])
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(root) and "/.venv/" not in frame.filename]
    frame = (ours or frames)[-1]
    return f"{os.path.relpath(frame.filename, root)}:{frame.lineno}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise `_TooSlow` after this much processor time of the process."""

    def stop(*_: object) -> None:
        raise _TooSlow

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
