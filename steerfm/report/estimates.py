"""Means with intervals: how far a figure would move if other prompts and seeds had been drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95
_CHUNK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Estimate:
    """Hold a mean over n values and its 95% bootstrap interval; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def covers_zero(self) -> bool:
        """Say whether zero lies in the interval, or nothing can be said because there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def estimate(values: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate | None:
    """Return the mean of the finite values with its percentile bootstrap interval, or None if there are none.

    Values are resampled one by one, as if every (prompt, seed) pair were independent. `seed` fixes the resamples.

    Reference: Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 13.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    if len(x) == 0:
        return None
    if len(x) == 1:
        return Estimate(float(x[0]), None, None, 1)
    generator, per_chunk = np.random.default_rng(seed), max(1, _CHUNK // len(x))
    sizes = [min(per_chunk, RESAMPLES - done) for done in range(0, RESAMPLES, per_chunk)]
    means = np.concatenate([x[generator.integers(len(x), size=(size, len(x)))].mean(1) for size in sizes])
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(float(x.mean()), float(low), float(high), len(x))
