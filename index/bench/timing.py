"""Measure the wall time of a call."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Call `work`; returns the seconds and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
