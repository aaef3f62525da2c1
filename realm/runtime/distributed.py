"""Ranks and collective operations of the training processes; no-ops with a single process.

Collectives use a separate gloo process group on the CPU, whatever backend the gradients use: NCCL
does not accept CPU tensors.
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

_TIMEOUT = timedelta(hours=6)
"""Timeout of a collective: long, because rank 0 may be encoding a corpus in the meantime."""


def rank() -> int:
    """Rank of this training process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of training processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """Device of this process: its local GPU, or the CPU without CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def is_rank_zero() -> bool:
    """Whether this process is rank 0, which writes all shared files."""
    return rank() == 0


@cache
def _group() -> Any:
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only and broadcast its result, which must be picklable.

    Every rank returns the result, or raises the UserError that `work` raised.
    """
    if world_size() == 1:
        return work()
    result_and_error: list[Any] = [None, None]
    failure: UserError | None = None
    if is_rank_zero():
        try:
            result_and_error[0] = work()
        except UserError as error:
            failure, result_and_error[1] = error, str(error)
    dist.broadcast_object_list(result_and_error, src=0, group=_group())
    if failure is not None:
        raise failure
    if result_and_error[1] is not None:
        raise UserError(result_and_error[1])
    return result_and_error[0]


def any_rank(flag: bool) -> bool:
    """Return True on every rank if `flag` is true on at least one."""
    return _reduce_flag(flag, dist.ReduceOp.MAX)


def all_ranks(flag: bool) -> bool:
    """Return True on every rank if `flag` is true on all of them."""
    return _reduce_flag(flag, dist.ReduceOp.MIN)


def _reduce_flag(flag: bool, operation: Any) -> bool:
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, operation, group=_group())
    return bool(value)


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Mean of each value over all ranks; every rank must pass the same names in the same order."""
    if world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, group=_group())
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def barrier() -> None:
    """Wait until all ranks reach this call."""
    if world_size() > 1:
        dist.barrier(group=_group())
