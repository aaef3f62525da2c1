"""Progress bars, `metrics.jsonl`, TensorBoard and tables on the console."""

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from realm.runtime.distributed import is_rank_zero
from realm.runtime.printable import printable


class _Console(Console):
    """A console on which strings are data: they contain no markup and no emoji codes, and their
    control characters are shown escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, also in a table, is converted here."""
        return super().render_str(printable(text), **options)


console = _Console(soft_wrap=True, quiet=not is_rank_zero())
"""Console output; only rank 0 prints."""


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text to print whose parts are plain, or pairs of a text and its style."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((printable(text), style) for text, style in pairs))


def log_line(line: str) -> None:
    """Print one line of a log, indented under the heading of the current stage."""
    console.print(f"  {line}")


class ProgressReporter:
    """Progress of one task: a bar on a terminal, else a line every `every_s` seconds.

    `update` is cheap and may be called often.
    """

    def __init__(self, title: str, total: int, done: int, unit: str, every_s: float) -> None:
        self.title, self.total, self.unit, self.every_s = printable(title), total, unit, every_s
        self.start_done, self.done = done, done
        self.started = self.last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        """Report that `done` units of the total are done."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=printable(note))
            return
        now = time.monotonic()
        if now - self.last_line >= self.every_s or done >= self.total:
            self.last_line = now
            rate = (done - self.start_done) / max(now - self.started, 1e-9)
            left = (self.total - done) / rate if rate > 0 else float("inf")
            eta = "" if done >= self.total else f", {format_seconds(left)} left"
            console.print(
                f"  {self.title}: {done:,}/{self.total:,} {self.unit}s, {rate:,.1f}/s{eta}{'  ' + note if note else ''}"
            )

    def set(self, done: int, total: int | None) -> None:
        """Set the number of finished units and the total; `total` is None while unknown."""
        self.total = total or done
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self.update(done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Rate(ProgressColumn):
    """Units per second since the start."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} {self.unit}s/s")


@contextmanager
def progress(
    title: str, total: int, done: int = 0, unit: str = "step", every_s: float = 10.0
) -> Iterator[ProgressReporter]:
    """Show the progress of `total` units, see `ProgressReporter`."""
    reporter = ProgressReporter(title, total, done, unit, every_s)
    try:
        yield reporter
    finally:
        reporter.close()


def format_seconds(seconds: float) -> str:
    """Format a duration as `42 s`, `3 min 05 s` or `2 h 10 min`; infinity as `?`."""
    if seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in GiB: `peak_gib` resident, `peak_gpu_gib` allocated by CUDA.

    `peak_gpu_gib` is absent without a GPU.
    """
    import torch

    peak = {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    if torch.cuda.is_available():
        peak["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peak


class Metrics:
    """Writer of `metrics.jsonl` and TensorBoard scalars; does nothing unless `enabled`."""

    def __init__(self, run_folder: Path, stage: str, enabled: bool = True) -> None:
        self.stage, self.enabled = stage, enabled
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            run_folder.mkdir(parents=True, exist_ok=True)
            path = run_folder / "metrics.jsonl"
            torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            self._file = path.open("a", buffering=1)
            if torn:  # a killed process left half a line; start a new one
                self._file.write("\n")
            self._board = SummaryWriter(str(run_folder / "tensorboard" / stage))

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Write one line `{"stage", "step", "time", …}`, and a TensorBoard scalar per number."""
        if not self.enabled:
            return
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
        self._file.write(
            json.dumps({"stage": self.stage, "step": step, "time": round(time.time(), 3), **rounded}) + "\n"
        )
        for name, value in values.items():
            if not isinstance(value, str):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            self._board.close()


METRIC_FIELDS = {"stage": str, "step": int}
"""Fields that every line of `metrics.jsonl` has."""


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read `metrics.jsonl`: the rows of each stage, in the order of steps.

    If a step was logged twice (by a resumed run), the last line is used.
    """
    by_stage: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_log(path, METRIC_FIELDS)[0]:
        by_stage.setdefault(row["stage"], {})[row["step"]] = row
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in by_stage.items()}


def read_log(path: Path, fields: Mapping[str, type]) -> tuple[list[dict[str, Any]], int]:
    """Read a log of one JSON object a line, each with `fields` of the given types.

    Returns the objects and the number of other lines, such as one that a killed process left
    incomplete; prints a warning if there are any.
    """
    rows, skipped = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            rows.append(row)
        elif line.strip():
            skipped += 1
    if skipped:
        log_line(f"warning: {skipped} of {skipped + len(rows)} lines of {path} are incomplete and are not used")
    return rows, skipped


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: the first column is left-aligned, the others are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(format_cell(cell) for cell in row))
    (console if console.is_terminal else _Console(width=160)).print(table)


def format_cell(cell: object) -> str:
    """Format a table cell: floats with one decimal, None as a dash."""
    if cell is None:
        return "–"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)
