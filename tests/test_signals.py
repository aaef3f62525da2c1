"""Ctrl-C and SIGTERM at any moment of any command: it ends within five seconds, leaves no process,
lease or traceback behind, and can be resumed."""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from realm.runtime.telemetry import read_metrics
from tests.tiny import realm, write_config, write_sources

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("ict", "reader_pretraining", "pretrain", "finetune_retriever", "finetune")


@dataclass(frozen=True)
class Command:
    """A command to interrupt, in the folder of a tiny run."""

    arguments: tuple[str, ...]
    prepare: Callable[[Path, Path], None]
    """Makes the new folder (second) from that of the finished run (first)."""
    check: Callable[[Path, Path], None] = lambda finished, folder: None
    """Checks what the command has written once it has ended undisturbed."""


def sources_only(finished: Path, folder: Path) -> None:
    folder.mkdir()
    write_sources(folder)
    write_config(folder, corpus={"num_workers": 2})


def copy_of(*missing: str) -> Callable[[Path, Path], None]:
    """The finished run without some of its files and folders."""

    def prepare(finished: Path, folder: Path) -> None:
        shutil.copytree(finished, folder)
        for config in (folder / "config.yaml", folder / "run" / "config.yaml"):
            config.write_text(config.read_text().replace(str(finished), str(folder)))
        for name in missing:
            shutil.rmtree(folder / "run" / name, ignore_errors=True)
        if "metrics.jsonl" in missing:
            (folder / "run" / "metrics.jsonl").unlink()
        more = {"id": "new", "title": "Norvik", "text": "Norvik is a town on the Moss. It was founded in 1777."}
        (folder / "more.jsonl").write_text(json.dumps(more) + "\n")

    return prepare


def same_losses(*stages: str) -> Callable[[Path, Path], None]:
    def check(finished: Path, folder: Path) -> None:
        expected, found = (read_metrics(path / "run" / "metrics.jsonl") for path in (finished, folder))
        for stage in stages:
            assert (folder / "run" / stage / "model").exists()
            assert [row["step"] for row in found[stage]] == [row["step"] for row in expected[stage]]
            # Which index a step of REALM searches depends on the time, so its losses do too.
            if stage in ("ict", "reader_pretraining"):
                losses = [[row["loss"] for row in rows[stage]] for rows in (expected, found)]
                np.testing.assert_allclose(*losses, rtol=1e-3)

    return check


def same_predictions(finished: Path, folder: Path) -> None:
    expected, found = (
        (path / "run" / "evaluations" / "test.finetune.predictions.jsonl").read_text() for path in (finished, folder)
    )
    assert found == expected


def same_corpus(finished: Path, folder: Path) -> None:
    for kind in ("passages", "statements"):
        expected, found = (
            json.loads((path / "prepared" / kind / "manifest.json").read_text()) for path in (finished, folder)
        )
        assert found["blocks"] == expected["blocks"] and found["spans"] == expected["spans"]


def has_index(finished: Path, folder: Path) -> None:
    # The stage may have been interrupted while it waited for its last index.
    assert realm("refresh", "--run", folder / "run", "--once").returncode == 0
    assert any(path.name.rpartition("-")[0].endswith("step-000008") for path in (folder / "run" / "indexes").iterdir())


def has_new_document(finished: Path, folder: Path) -> None:
    done = realm("ask", "--run", folder / "run", "Where is Norvik?")
    assert done.returncode == 0 and "new" in done.stdout, done.stderr


LATER = {stage: (*STAGES[number:], "metrics.jsonl") for number, stage in enumerate(STAGES)}
STORE = ("encoders", "indexes", "refresher", "lineage.json", "training-ended")
CONFIG, RUN = ("--config", "config.yaml"), ("--run", "run")
COMMANDS = {
    "prepare": Command(("prepare", *CONFIG), sources_only, same_corpus),
    "ict": Command(("ict", *CONFIG, "--resume"), copy_of(*LATER["ict"]), same_losses("ict")),
    "reader-pretraining": Command(
        ("reader-pretraining", *CONFIG, "--resume"),
        copy_of(*LATER["reader_pretraining"], "frozen"),
        same_losses("reader_pretraining"),
    ),
    "pretrain": Command(
        ("pretrain", *CONFIG, "--with-refresher", "--resume"), copy_of(*LATER["pretrain"], *STORE), has_index
    ),
    "finetune-retriever": Command(
        ("finetune-retriever", *RUN, "--resume"),
        copy_of(*LATER["finetune_retriever"]),
        same_losses("finetune_retriever"),
    ),
    "finetune": Command(("finetune", *RUN, "--resume"), copy_of(*LATER["finetune"], "frozen"), same_losses("finetune")),
    "run": Command(("run", *CONFIG, "--resume"), sources_only, same_losses(*STAGES)),
    "refresh": Command(("refresh", *RUN), copy_of("indexes", "refresher"), has_index),
    "evaluate": Command(("evaluate", *RUN), copy_of("evaluations", "frozen"), same_predictions),
    "ask": Command(("ask", *RUN, "Who founded Alda?"), copy_of("frozen")),
    "plan": Command(("plan", *CONFIG), copy_of()),
    "verify": Command(("verify", "run"), copy_of()),
    "index add": Command(("index", "add", *RUN, "more.jsonl", "--replace"), copy_of(), has_new_document),
    "index verify": Command(("index", "verify", *RUN), copy_of()),
    "index gc": Command(("index", "gc", *RUN), copy_of()),
    "index ls": Command(("index", "ls", *RUN), copy_of()),
    "bench index": Command(("bench", "index", *RUN, "--passages", "200", "--synthetic", "40000x32"), copy_of()),
    "bench attention": Command(
        ("bench", "attention", "--variants", "dense", "linformer", "--lengths", "64", "--no-peers"), sources_only
    ),
    "bench long": Command(("bench", "long", "--tasks", "passkey", "--steps", "5", "--tests", "10"), sources_only),
    "bench swaps": Command(("bench", "swaps", "--rows", "20000", "--steps", "40", "--every", "20"), sources_only),
    "bench faults": Command(("bench", "faults", "--kills", "6", "--flips", "20"), sources_only),
}


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in its own session; its output is in `output.log`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "output.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "realm", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def interrupt(arguments: Sequence[str], folder: Path, after_s: float, number: int, group: bool) -> int | None:
    """Start a command and send it a signal; checks how it ends.

    `group`: send the signal to the whole process group, as a terminal does. Returns its status;
    None if it ended before the signal.
    """
    process = start(arguments, folder)
    what = f"{' '.join(arguments)}, {signal.Signals(number).name}{' to the group' if group else ''} at {after_s:.2f} s"
    try:
        process.wait(after_s)
        assert process.returncode == 0, f"{what}: {(folder / 'output.log').read_text()}"
        return None
    except subprocess.TimeoutExpired:
        pass
    sent = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    try:
        process.wait(10)
        took = time.monotonic() - sent
        left = session_of(process.pid)
        output = f"{what}, ended after {took:.1f} s with {process.returncode}: " + (folder / "output.log").read_text()
        assert took < 5, output
        if "Fatal Python error: init_import_site" in output:  # before any of our code
            return process.returncode
        assert process.returncode in (0, 128 + number, -number), output
        assert "Traceback" not in output and "Error" not in output, output
        assert not left, f"{left} are left by {output}"
        check_released(folder, output)
        return process.returncode
    except subprocess.TimeoutExpired:
        pytest.fail(f"{what}: still running, {(folder / 'output.log').read_text()}")
    finally:
        for other in [process.pid, *(int(line.split()[0]) for line in session_of(process.pid, 0))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        process.wait()


def session_of(session: int, patience_s: float = 3.0) -> list[str]:
    """The processes of a session that are still alive after a while."""
    deadline = time.monotonic() + patience_s
    while True:
        alive = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            try:
                if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                    alive.append(f"{process.pid} {' '.join(process.info['cmdline'] or [])[:200]}")
            except OSError:
                continue
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def check_released(folder: Path, output: str) -> None:
    """Fails if a lease or a lock is still held."""
    for lease in folder.rglob("lease"):
        epochs = sorted(lease.glob("epoch-*"))
        assert not epochs or (epochs[-1] / "released").exists(), f"{epochs[-1]} is not released by {output}"
    for lock in folder.rglob("locks/*"):
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def interrupt_often(command: Command, finished: Path, tmp_path: Path, times: int, seed: int) -> None:
    """Interrupt a command and its resumptions at random moments, then let it finish."""
    rng = random.Random(seed)
    undisturbed = tmp_path / "undisturbed"
    command.prepare(finished, undisturbed)
    began = time.monotonic()
    assert start(command.arguments, undisturbed).wait(300) == 0, (undisturbed / "output.log").read_text()
    seconds = time.monotonic() - began
    folder, problems, done = tmp_path / "0", [], 0
    command.prepare(finished, folder)
    for attempt in range(1, 3 * times):
        if done == times:
            break
        number, group = rng.choice(((signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)))
        try:
            status = interrupt(command.arguments, folder, rng.uniform(0.02, seconds), number, group)
            done += status is not None
            if status in (0, None):  # it has finished
                command.check(finished, folder)
                folder = tmp_path / str(attempt)
                command.prepare(finished, folder)
        except (AssertionError, pytest.fail.Exception) as problem:
            done += 1
            problems.append(str(problem))
    assert start(command.arguments, folder).wait(300) == 0, (folder / "output.log").read_text()
    command.check(finished, folder)
    assert not problems, f"{len(problems)} of {done}:\n\n" + "\n\n".join(problems)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_twenty_moments_of_every_command(finished: Path, tmp_path: Path, name: str) -> None:
    interrupt_often(COMMANDS[name], finished, tmp_path, 20, seed=list(COMMANDS).index(name))


@pytest.mark.parametrize(
    ("name", "after_s", "number", "group"),
    [
        ("prepare", 2.5, signal.SIGINT, True),
        ("pretrain", 4.5, signal.SIGINT, True),
        ("ask", 0.5, signal.SIGTERM, False),
    ],
)
def test_a_signal_ends_a_command_within_seconds(
    finished: Path, tmp_path: Path, name: str, after_s: float, number: int, group: bool
) -> None:
    command, folder = COMMANDS[name], tmp_path / "0"
    command.prepare(finished, folder)
    assert interrupt(command.arguments, folder, after_s, number, group) is not None
