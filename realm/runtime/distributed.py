"""Ranks and collective operations of the training processes; no-ops with a single process.

Collectives use a separate gloo process group on the CPU, whatever backend the gradients use: NCCL
does not accept CPU tensors.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from realm.errors import UserError
from realm.runtime.signals import Interrupted

T = TypeVar("T")

_TIMEOUT = timedelta(hours=6)
"""Timeout of a collective: long, because rank 0 may be encoding a corpus in the meantime."""

_INTERRUPT = ""
"""Description of a failure by Ctrl-C or SIGTERM."""


def rank() -> int:
    """Rank of this training process."""
    return _launcher_number("RANK", 0)


def world_size() -> int:
    """Number of training processes."""
    size = _launcher_number("WORLD_SIZE", 1)
    if size > 1 and "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {size}, but RANK is not set; start all processes with deepspeed or torchrun, or unset it."
        )
    return size


def _launcher_number(name: str, default: int) -> int:
    """An environment variable that a launcher sets. Raises UserError if it is not a number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} must be a whole number, got {text!r}; unset it.")
    return int(text)


def local_device() -> torch.device:
    """Device of this process: its local GPU, or the CPU without CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _launcher_number("LOCAL_RANK", 0) % torch.cuda.device_count())


def is_rank_zero() -> bool:
    """Whether this process is rank 0, which writes all shared files."""
    return rank() == 0


@cache
def _group() -> Any:
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only and broadcast its result, which must be picklable.

    Every rank returns the result, or fails if `work` raised: rank 0 with that exception, the others
    as described at `on_all_ranks`.
    """
    if world_size() == 1:
        return work()
    result: T | None = None
    failure: BaseException | None = None
    if is_rank_zero():
        try:
            result = work()
        except BaseException as error:
            failure = error
    outcome: list[Any] = [result, _description(failure)]
    dist.broadcast_object_list(outcome, src=0, group=_group())
    _raise_failure(failure, [outcome[1]])
    return cast(T, outcome[0])


def on_all_ranks(work: Callable[[], object]) -> None:
    """Run `work`, which contains no collectives, on every rank, and wait for all.

    If it raises on one rank, no rank waits for it forever: that rank raises the exception, and the
    others raise a UserError with its text, or KeyboardInterrupt after an interrupt.
    """
    failure: BaseException | None = None
    try:
        work()
    except BaseException as error:
        failure = error
    failures = [_description(failure)]
    if world_size() > 1:
        failures *= world_size()
        dist.all_gather_object(failures, _description(failure), group=_group())
    _raise_failure(failure, failures)


def _description(failure: BaseException | None) -> str | None:
    """A failure as text for the other ranks, which may not be able to unpickle it."""
    if failure is None:
        return None
    if isinstance(failure, UserError):
        return str(failure)
    if isinstance(failure, Interrupted) or not isinstance(failure, Exception):
        return _INTERRUPT
    return f"rank {rank()} failed with {type(failure).__name__}: {failure}"


def _raise_failure(own: BaseException | None, failures: Sequence[str | None]) -> None:
    """Raise this rank's failure, or else the first one of another rank, if there is any."""
    if own is not None:
        raise own
    for failure in failures:
        if failure is not None:
            raise KeyboardInterrupt if failure == _INTERRUPT else UserError(failure)


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
