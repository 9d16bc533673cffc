"""The kernel distance: unbiased MMD² of features under a cubic kernel, with its standard error.

    k(x, y) = (x·y / D + 1)³

It sees means, covariances and skewness of the features and nothing beyond. Unlike the Fréchet distance it has no bias:
a perfect generator's figure is 0 on average at any sample size, so that figures of different sizes compare, each
with its error.

Reference: Bińkowski et al. 2018, arXiv 1801.01401 (with Inception features: KID).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.metrics.points import as_vectors, same_dimension

LARGEST_SUBSET = 1000  # as published


@dataclass(frozen=True)
class KernelDistance:
    """Hold a kernel distance, its standard error, and the sizes it comes from.

    mean: over subsets; negative about half of the time when the sets agree. error: the sampling error of `mean`,
    NaN where it cannot be told. samples: the size of the smaller set.
    """

    mean: float
    error: float
    samples: int
    subset_size: int
    subsets: int


def kernel_distance(
    samples: Tensor, data: Tensor, *, subset_size: int | None = None, subsets: int = 100, seed: int = 0
) -> KernelDistance:
    """Return the kernel distance of features (N, *dim) and (M, *dim), N and M of at least 4, in float64.

    The mean over random subsets of `subset_size` rows of each set (by default 1000, or half of the smaller set).
    Its standard error, for subsets of m of n rows, is std √(m / (n - m) + 1 / subsets): the delete-d jackknife's for
    what n samples leave unknown, and the noise of drawing subsets. std / √subsets alone, as often printed, shrinks
    without limit as subsets are added. Right where the sets differ clearly; near 0, where MMD² varies like 1/n and not
    1/√n, too large by up to √(1 + n/m), that is 1.7 at m = n/2. NaN for one subset or subsets of all rows. Floor:
    mean 0, with the spread `floor_of(lambda a, b: kernel_distance(a, b).mean, data).std`.

    Through torchmetrics' `poly_mmd`, whose import takes seconds. Reference for the error: Shao & Wu 1989, "A
    general theory for jackknife variance estimation". Raises DataError for sets that do not fit.
    """
    x, y = (as_vectors(each, least=4, name="A kernel distance") for each in (samples, data))
    same_dimension(x, y)
    n = min(len(x), len(y))
    m = min(LARGEST_SUBSET, n // 2) if subset_size is None else subset_size
    if not 2 <= m <= n or subsets < 1:
        raise DataError(f"A kernel distance needs subsets of 2 to {n} rows, and at least one, got {m} and {subsets}.")
    from torchmetrics.image.kid import poly_mmd

    generator, figures = np.random.default_rng(seed), []
    for _ in range(subsets):
        rows = (torch.from_numpy(generator.choice(len(each), m, replace=False)).to(each.device) for each in (x, y))
        figures.append(float(poly_mmd(x[next(rows)], y[next(rows)])))
    known = m < n and subsets > 1
    error = float(np.std(figures, ddof=1)) * math.sqrt(m / (n - m) + 1 / subsets) if known else math.nan
    return KernelDistance(float(np.mean(figures)), error, n, m, subsets)
