"""Errors of one rank reach all ranks: two processes over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

_RANK = """
import torch.distributed as dist

from realm.errors import UserError
from realm.runtime.distributed import on_all_ranks, on_rank_zero, rank

dist.init_process_group("gloo")


def fails_on(number, error):
    def work():
        if rank() == number:
            raise error
        return "result"

    return work


for collective, number, error in (
    (on_rank_zero, 1, OSError("not called")),
    (on_rank_zero, 0, UserError("the disk is full")),
    (on_rank_zero, 0, OSError(28, "No space left on device")),
    (on_rank_zero, 0, KeyboardInterrupt()),
    (on_all_ranks, 2, OSError("not called")),
    (on_all_ranks, 0, OSError(28, "No space left on device")),
    (on_all_ranks, 1, OSError(28, "No space left on device")),
):
    try:
        print("returned", collective(fails_on(number, error)))
    except BaseException as error:
        print(type(error).__name__, error)
"""


def on_two_ranks(code: str, *arguments: object, timeout: float = 60) -> list[subprocess.CompletedProcess[str]]:
    """Run `code` in two processes that a launcher's environment variables describe."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def outcomes() -> list[list[str]]:
    """The lines of each rank."""
    ranks = on_two_ranks(_RANK)
    assert all(rank.returncode == 0 for rank in ranks), ranks[0].stderr + ranks[1].stderr
    return [rank.stdout.splitlines() for rank in ranks]


def test_an_error_on_rank_zero_is_raised_on_every_rank(outcomes: list[list[str]]) -> None:
    full = "OSError [Errno 28] No space left on device"
    assert outcomes[0][:4] == ["returned result", "UserError the disk is full", full, "KeyboardInterrupt "]
    forwarded = f"UserError rank 0 failed with OSError: {full.removeprefix('OSError ')}"
    assert outcomes[1][:4] == ["returned result", "UserError the disk is full", forwarded, "KeyboardInterrupt "]


def test_an_error_on_any_rank_is_raised_on_every_rank(outcomes: list[list[str]]) -> None:
    full = "[Errno 28] No space left on device"
    assert outcomes[0][4:] == ["returned None", f"OSError {full}", f"UserError rank 1 failed with OSError: {full}"]
    assert outcomes[1][4:] == ["returned None", f"UserError rank 0 failed with OSError: {full}", f"OSError {full}"]
