"""The trainer's processes: how many there are, and how they agree. With one process everything here
is a plain call.

Agreement goes over a group of its own on the CPU, whatever the gradients travel over: NCCL takes no
CPU tensors.
"""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from realm.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: rank 0 may be encoding a corpus meanwhile."""


def rank() -> int:
    """This process's number among the trainer's."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of trainer processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """Where this process computes: its own GPU among those of this host, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def is_rank_zero() -> bool:
    """Whether this process writes what all share."""
    return rank() == 0


@cache
def _group() -> Any:
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def on_rank_zero(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone; every rank returns its result (which must be picklable) or
    raises its UserError."""
    if world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    failure: UserError | None = None
    if is_rank_zero():
        try:
            box[0] = work()
        except UserError as error:
            failure, box[1] = error, str(error)
    dist.broadcast_object_list(box, src=0, group=_group())
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def any_rank(flag: bool) -> bool:
    """True on all ranks if it is true on any."""
    return _reduced(flag, dist.ReduceOp.MAX)


def all_ranks(flag: bool) -> bool:
    """True on all ranks if it is true on every one."""
    return _reduced(flag, dist.ReduceOp.MIN)


def _reduced(flag: bool, operation: Any) -> bool:
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, operation, group=_group())
    return bool(value)


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Each figure's mean over all ranks; the names must be the same everywhere."""
    if world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, group=_group())
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(group=_group())
