"""Bootstrap intervals of means."""

import numpy as np


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-question values; deterministic per seed."""
    values = np.asarray(values, dtype=np.float64)
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    low, high = np.quantile(counts @ values / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
