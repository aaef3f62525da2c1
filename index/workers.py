"""The refresher's processes, under `torchrun` on one host or many: who encodes which shard, and how
all learn what the first one decides.

They share nothing with the trainer's processes. Starting them, finding each other and restarting
all when one dies is torchrun's work; what was finished lies in the file system. Alone, everything
here is a plain call.
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

_PATIENCE = timedelta(days=7)
"""How long a worker waits for the first one, which may be polling for the next export."""


@dataclass(frozen=True)
class WorkerGroup:
    """This process's place among the refresher's."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "WorkerGroup":
        """Meet the others as the launcher's variables say; without a launcher this process is
        alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
        # torchrun may keep one store over its restarts, and with it the addresses of the dead.
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        return cls(rank, size)

    def leave(self) -> None:
        """End the group."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this one holds the lease, decides, builds and publishes."""
        return self.rank == 0

    def run_on_first(self, decide: Callable[[], T]) -> T:
        """Call `decide` in the first process; all return what it returned, or raise what it raised."""
        if self.size == 1:
            return decide()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = decide()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def run_on_all(self, work: Callable[[], object]) -> None:
        """Call `work` in every process and wait for all; what any of them raised, all raise."""
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
