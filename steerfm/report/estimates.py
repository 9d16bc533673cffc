"""Means with intervals: how far a figure would move if other prompts and seeds had been drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 2000
COVERAGE = 0.95
FEWEST_PROMPTS = 10  # below, resampling whole prompts says little of other prompts
_CHUNK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Estimate:
    """Hold a mean over n values and its 95% bootstrap interval; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int
    over_prompts: bool = field(default=False, compare=False)  # whole prompts were resampled

    @property
    def covers_zero(self) -> bool:
        """Say whether zero lies in the interval, or nothing can be said because there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def estimate(values: Sequence[float] | np.ndarray, prompts: Sequence[str] = (), seed: int = 0) -> Estimate | None:
    """Return the mean of the finite values with its bootstrap interval, or None if there are none.

    prompts (N,): where there are at least `FEWEST_PROMPTS` different ones, whole prompts are resampled, since the
    samples of one prompt have its difficulty in common, and the interval speaks of other prompts too. Else the values
    are resampled one by one, and it speaks of these prompts alone. `seed` fixes the resamples.

    Percentiles are widened for few units, so that their interval for a mean is as wide as Student's.
    Reference: Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 13; Hesterberg 2015, "What teachers
    should know about the bootstrap", section 5.2 (expanded percentiles).
    """
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    x, prompts = x[known], [prompt for prompt, ok in zip(prompts, known, strict=True) if ok] if len(prompts) else ()
    if len(x) == 0:
        return None
    if len(x) == 1:
        return Estimate(float(x[0]), None, None, 1)
    sums, counts = _units(x, prompts)

    def mean(drawn: np.ndarray) -> np.ndarray:
        return sums[drawn].sum(1) / counts[drawn].sum(1)

    low, high = bootstrap(mean, len(sums), seed)
    return Estimate(float(x.mean()), low, high, len(x), over_prompts(prompts))


def over_prompts(prompts: Sequence[str]) -> bool:
    """Say whether intervals resample whole prompts."""
    return len(set(prompts)) >= FEWEST_PROMPTS


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], units: int, seed: int = 0) -> tuple[float, float]:
    """Return the interval of a statistic of resampled units: it is given indices (R, units) and returns (R,)."""
    generator, per_chunk = np.random.default_rng(seed), max(1, _CHUNK // units)
    sizes = [min(per_chunk, RESAMPLES - done) for done in range(0, RESAMPLES, per_chunk)]
    found = np.concatenate([statistic(generator.integers(units, size=(size, units))) for size in sizes])
    tail = expanded_tail(units)
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(units: int) -> float:
    """Return the share below the lower percentile: Phi(-sqrt(n / (n - 1)) t), t Student's quantile with n - 1."""
    quantile = float(stdtrit(units - 1, 0.5 + COVERAGE / 2))
    return NormalDist().cdf(-math.sqrt(units / (units - 1)) * quantile)


def _units(x: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of the values of each unit that is resampled: a prompt, or a value."""
    if not over_prompts(prompts):
        return x, np.ones_like(x)
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    unit = [places[prompt] for prompt in prompts]
    return np.bincount(unit, x), np.bincount(unit).astype(np.float64)
