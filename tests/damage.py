"""Damage to the files of a run: tiny runs, every kind of damage, and every command.

`Workplace` keeps finished and stopped runs, restores them before each case, and runs one command
in this process after one path was damaged. A case is sound if the command ends with one sentence
and exit status 2, or succeeds with the result of the undamaged run.
"""

import contextlib
import ctypes
import io
import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from realm.app.cli import main
from realm.run.folder import STAGES
from tests.damage_commands import COMMANDS, listing, versions
from tests.damage_kinds import FILE_DAMAGE, FOLDER_DAMAGE, Case
from tests.tiny import tiny_tree, write_sources

SECONDS_PER_CASE = 60
_APPENDED = ("metrics.jsonl", "log.jsonl", "output.log", "heartbeat", "events.out")
"""Beginnings of the names of files that commands write in place."""
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def _write_run(folder: Path, seed: int) -> None:
    """A finished run in `folder/run` with two checkpoints of each stage and two evaluations."""
    write_sources(folder)
    if seed:  # another corpus
        for name in ("passages.jsonl", "questions.json", "statements.jsonl", "masked_spans.jsonl"):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace("river", "mighty stream").replace("Calvia", "Zorbia"))
    more = {"id": "more", "title": "Mirra", "text": "Mirra is a town on the river Quell. It was founded by Zoe Lake."}
    (folder / "more.jsonl").write_text(json.dumps(more) + "\n")
    tree = tiny_tree(folder)
    for stage in STAGES:
        tree[stage] |= {"checkpoint_every": 2}
    tree["refresh"] |= {"wait_timeout_s": 0.5, "lease_expiry_s": 0.3}
    tree["seed"] = seed
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    config, run = ("--config", folder / "config.yaml"), ("--run", folder / "run")
    for arguments in (
        ("prepare", *config),
        ("ict", *config),
        ("reader-pretraining", *config),
        ("pretrain", *config),
        ("refresh", *run, "--once"),
        ("finetune-retriever", *run),
        ("finetune", *run),
        ("evaluate", *run, "--name", "again"),
        ("run", *config, "--resume"),
    ):
        status, output, errors = run_command(*map(str, arguments))
        assert status == 0, (arguments, output, errors)


def run_command(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process; returns exit status, standard output and standard error.

    An exception that escapes has the status 1, as in a process of its own.
    """
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = main(list(arguments))
        except SystemExit as exit:
            status = int(exit.code or 0)
        except Exception:
            errors.write(traceback.format_exc())
            status = 1
    return status, output.getvalue(), errors.getvalue()


class Workplace:
    """Runs to damage: `folder` is restored from kept copies before each case."""

    def __init__(self, parent: Path) -> None:
        self.folder, self._kept, self._other = parent / "work", parent / "kept", parent / "other"
        for folder, seed in ((self._other, 1), (self.folder, 0)):
            folder.mkdir()
            _write_run(folder, seed)
        shutil.copytree(self.folder, self._kept)
        self._expected: dict[str, Any] = {}

    def restore(self, stopped: str | None) -> None:
        """Restore the finished run, or the run as if it had been stopped in a stage."""
        _restore(self._kept, self.folder)
        if stopped is not None:
            names, run = list(STAGES), self.folder / "run"
            shutil.rmtree(run / stopped / "model")
            for later in (run / name for name in names[names.index(stopped) + 1 :]):
                shutil.rmtree(later)

    @cached_property
    def paths(self) -> dict[str, bool]:
        """The files (True) and folders (False) of the finished run and its prepared folder."""
        found = sorted(path for part in ("run", "prepared") for path in (self._kept / part).rglob("*"))
        return {path.relative_to(self._kept).as_posix(): path.is_file() for path in found}

    def cases(self, command: str) -> list[Case]:
        """All cases of a command."""
        stopped, names = COMMANDS[command].stopped, list(STAGES)
        later = () if stopped is None else (f"run/{name}" for name in names[names.index(stopped) + 1 :])
        absent = () if stopped is None else (f"run/{stopped}/model", *later)
        return [
            Case(command, path, damage)
            for path, is_file in self.paths.items()
            if not path.startswith(absent) and re.match(COMMANDS[command].paths, path)
            for damage in (FILE_DAMAGE if is_file else FOLDER_DAMAGE)
            if damage != "of another run" or self._differs(path)
        ]

    def _differs(self, path: str) -> bool:
        other = self._other / path
        return other.is_file() and other.read_bytes() != (self._kept / path).read_bytes()

    def expected(self, command: str) -> Any:
        """The result of a command without damage."""
        if command not in self._expected:
            self.restore(COMMANDS[command].stopped)
            status, output, errors = self._run(command)
            assert status == 0, (command, output, errors)
            self._expected[command] = COMMANDS[command].result(self.folder, output)
        return self._expected[command]

    def _run(self, command: str) -> tuple[int, str, str]:
        return run_command(*(part.format(folder=self.folder) for part in COMMANDS[command].arguments))

    def problem(self, case: Case) -> str | None:
        """What is wrong with the outcome of a case; None if it is sound."""
        expected = self.expected(case.command)
        command = COMMANDS[case.command]
        self.restore(command.stopped)
        path = self.folder / case.path
        if not path.exists():
            return None
        (FILE_DAMAGE | FOLDER_DAMAGE)[case.damage](path, self._other / case.path)
        try:
            with _time_limit(), _without_override():
                status, output, errors = self._run(case.command)
        except TimeoutError:
            return "hangs"
        finally:
            with contextlib.suppress(OSError):
                path.chmod(0o755)
        if status == 2:
            sound = errors.startswith("realm: ") and "Traceback" not in errors and errors.count("\n") <= 25
            return None if sound else f"exit status 2 without a sentence:\n{errors}"
        if status != 0:
            return f"exit status {status}:\n{errors}"
        if command.may_report and re.search(command.may_report, output):
            return None
        if case.command == "verify" and _is_verified(case):
            return f"exit status 0 with damage:\n{output}"
        try:
            found = command.result(self.folder, output)
            if command.result in (listing, versions):  # a version that was removed is not listed
                lost = case.path.removeprefix("run/")
                found, expected = ([name for name in names if not _inside(name, lost)] for names in (found, expected))
        except Exception:
            return f"exit status 0 without a result:\n{output}\n{traceback.format_exc()}"
        return None if found == expected else f"exit status 0 with another result:\n{output}\n{_short(found, expected)}"


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _is_verified(case: Case) -> bool:
    """Whether `realm verify` must find the damage: neither a log, nor a cache, nor an optional part
    that is missing as a whole, nor a file that is valid in another run."""
    if re.match(r"run/(tensorboard|curves|refresher|training-ended|frozen/\w+/refresher)|prepared/spans", case.path):
        return False
    if case.damage in ("missing", "removed", "emptied") and re.fullmatch(
        r"run/(initial|initial/retriever|frozen|frozen/\w+|(frozen/\w+/)?(encoders|indexes)(/[\w-]+)?|evaluations(/[\w.-]+)?"
        r"|\w+/checkpoints|\w+/checkpoints/step-\d+|\w+|metrics.jsonl|summary.json|(frozen/\w+/)?lineage.json)",
        case.path,
    ):
        return case.damage == "emptied" and bool(re.search(r"initial/retriever|/(step-\d+|a\d[\w-]+)$", case.path))
    is_free = r"run/(config.yaml|metrics.jsonl|summary.json|lineage.json|evaluations/.*|\w+/model/seconds.txt)"
    return not (case.damage == "of another run" and re.fullmatch(is_free, case.path))


def _short(found: Any, expected: Any) -> str:
    return f"found {str(found)[:600]}\nexpected {str(expected)[:600]}"


def _restore(source: Path, target: Path) -> None:
    """Make `target` equal to `source`: hard links, but copies of files that are appended to."""
    target.mkdir(parents=True, exist_ok=True)
    kept = {entry.name: entry for entry in os.scandir(source)}
    for entry in list(os.scandir(target)):
        is_folder = entry.is_dir(follow_symlinks=False)
        same = entry.name in kept and (
            is_folder if kept[entry.name].is_dir() else entry.inode() == kept[entry.name].inode()
        )
        if not same and is_folder:
            shutil.rmtree(entry)
        elif not same:
            os.unlink(entry)
    for name, entry in kept.items():
        if entry.is_dir():
            _restore(source / name, target / name)
        elif not (target / name).exists():
            (shutil.copy2 if name.startswith(_APPENDED) else os.link)(entry, target / name)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in the main thread after `SECONDS_PER_CASE`."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _without_override() -> Iterator[None]:
    """Without root's right to read every file, so that `chmod 000` applies; for this thread and
    those that it starts."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data) != 0:
        yield
        return
    before = data[0]
    data[0] &= ~((1 << _CAP_DAC_OVERRIDE) | (1 << _CAP_DAC_READ_SEARCH))
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = before
        libc.capset(header, data)
