"""CPU cores and threads of this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_beside(others: int) -> int:
    """Number of threads for a process beside another one with `others` threads, at least 1.

    Torch's default, which is the number of cores or `OMP_NUM_THREADS`, less the other's threads:
    more threads than cores make both processes slower.
    """
    default = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(default) if default.isdecimal() else cores()) - others)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run torch on `count` threads (0: unchanged); restore the previous number on exit."""
    import torch  # slow to import, and the processes that prepare a corpus do not need it

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
