"""What a perfect generator would score: no distance between finite sets is zero, and no recall is one.

A figure means something only beside its floor, at the same sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.metrics.points import as_vectors


@dataclass(frozen=True)
class Floor:
    """Hold the mean and standard deviation of a metric over redrawn real data, and the size of each draw.

    std: that of one figure, not of the mean; NaN for a single repeat.
    """

    mean: float
    std: float
    samples: int
    repeats: int


def floor_of(
    metric: Callable[[Tensor, Tensor], float | Tensor],
    data: Tensor,
    n: int | None = None,
    *,
    with_replacement: bool = False,
    repeats: int = 16,
    seed: int = 0,
) -> Floor:
    """Return what `metric(samples, reference)` gives where the samples are real; data (N, *dim).

    By default n rows drawn without replacement (half of them) play the samples, and the rest the reference: right
    for every metric, and a little high for a biased one, since the reference is smaller than the whole set. With
    replacement, n rows (N by default) are compared with all of data: a generator that has learnt this very set.
    That is wrong wherever a copy of a data point counts (nearest distances, precision and recall, MMD).

    A metric of one set ignores its second argument. An unbiased metric (MMD, kernel distance) has mean 0, and its
    standard deviation is the floor. For a score that is better when larger (recall, Vendi score), this is the
    ceiling. Draws overlap, so that repeats do not make the mean better than the data allow.
    """
    x = as_vectors(data, least=2, name="A floor")
    total = len(x)
    n = (total if with_replacement else total // 2) if n is None else n
    most = "" if with_replacement else f" and at most {total - 1}, which leaves a reference"
    if n < 1 or (not with_replacement and n >= total) or repeats < 1:
        raise DataError(f"A floor needs n of at least 1{most}, and one repeat or more, got {n} and {repeats}.")
    generator, figures = np.random.default_rng(seed), []
    for _ in range(repeats):
        if with_replacement:
            samples, reference = x[torch.from_numpy(generator.integers(total, size=n))], x
        else:
            order = torch.from_numpy(generator.permutation(total))
            samples, reference = x[order[:n]], x[order[n:]]
        figures.append(float(metric(samples, reference)))
    std = float(np.std(figures, ddof=1)) if repeats > 1 else math.nan
    return Floor(float(np.mean(figures)), std, n, repeats)
