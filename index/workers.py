"""The refresher's worker processes, under `torchrun` on one host or many: which worker encodes
which shard, and how the first worker's decisions reach the others.

They are independent of the trainer's processes. torchrun starts them, connects them, and restarts
all when one dies; finished work is kept in the file system. With a single process every method is
a plain call.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from realm.runtime.distributed import local_device

T = TypeVar("T")

_TIMEOUT = timedelta(days=7)
"""How long a worker waits for the first one, which may be polling for the next export."""


@dataclass(frozen=True)
class WorkerGroup:
    """The refresher's group of processes, and this process's rank in it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "WorkerGroup":
        """Join the group described by the launcher's environment variables; without a launcher the
        group is this process."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        # torchrun may keep its store across restarts, including the addresses of dead processes.
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
        return cls(rank, size)

    def leave(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this worker holds the lease, decides, builds and publishes."""
        return self.rank == 0

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Call `work` in the first process; all processes return its result or raise its error."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]  # result, error
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def run_on_all(self, work: Callable[[], object]) -> None:
        """Call `work` in every process and wait for all; an error in one is raised in all."""
        if self.size == 1:
            work()
            return
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, failure)
        for failure in failures:
            if failure is not None:
                raise failure
