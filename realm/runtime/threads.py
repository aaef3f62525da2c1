"""Cores and threads of this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on `count` threads (0: as many as now) and give back what was set before, whatever
    is set within."""
    import torch  # slow to load, and preparing the corpus in several processes needs none of it

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
