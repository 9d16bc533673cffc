"""The squared maximum mean discrepancy: how far two sets are in the mean of every function a kernel knows.

    MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y)

Estimated without bias: no point is compared with itself, so that two sets from one distribution have mean 0 at any
sample size, and half of the figures are negative. Its spread falls like 1/N at the floor and like 1/√N away from it.

Reference: Gretton et al. 2012, "A kernel two-sample test", JMLR 13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.metrics.points import as_vectors, same_dimension

Kernel = Literal["gaussian", "energy"]
_MOST_ROWS = 2000  # the median of two million distances is known to one part in a thousand


def squared_mmd(
    samples: Tensor,
    data: Tensor,
    kernel: Kernel = "gaussian",
    bandwidth: float | None = None,
    *,
    chunk: int = 1024,
) -> float:
    """Return the unbiased MMD² of samples (N, *dim) and data (M, *dim), N and M of at least 2, in float64.

    kernel: "gaussian", exp(-|x - y|² / (2 h²)), in [-1, 2] here; or "energy", -|x - y|, whose MMD² is the energy
    distance, in the units of the data, and which has no bandwidth. bandwidth: h; by default `median_distance` of
    **data** alone, so that figures of different samples against one data set compare. It is blind to what is much
    smaller or much larger than h. Unbiased: the floor's mean is 0, its spread `floor_of(squared_mmd, data).std`.
    """
    x, y = (as_vectors(each, least=2, name="An MMD") for each in (samples, data))
    same_dimension(x, y)
    of_distance = _kernel(kernel, bandwidth, y)
    centre = y.mean(0)  # so that the matrix-product formula of distances loses nothing to cancellation
    x, y = x - centre, y - centre
    between = _sum(of_distance, x, y, chunk) / (len(x) * len(y))
    return _mean_within(of_distance, x, chunk) + _mean_within(of_distance, y, chunk) - 2 * between


def median_distance(x: Tensor) -> float:
    """Return the median Euclidean distance between different rows of x (N, *dim), N of at least 2.

    The median heuristic for a bandwidth, of one set where Gretton et al. 2012 pool both. Of sets larger than 2000,
    that many rows at equal spacing are used. Raises DataError where it is 0, as more than half of the pairs are copies.
    """
    vectors = as_vectors(x, least=2, name="A median distance")
    if len(vectors) > _MOST_ROWS:
        vectors = vectors[torch.linspace(0, len(vectors) - 1, _MOST_ROWS).round().long()]
    median = float(torch.pdist(vectors).median())
    if median == 0:
        raise DataError("The median distance of the set is 0, got copies of one row mostly: give a bandwidth.")
    return median


def _kernel(kernel: str, bandwidth: float | None, data: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the kernel as a function of the distance."""
    if kernel == "energy" and bandwidth is None:
        return torch.neg
    if kernel != "gaussian" or (bandwidth is not None and not bandwidth > 0):
        raise DataError(
            "An MMD's kernel is 'gaussian' with a bandwidth above 0, or 'energy' without one, "
            f"got '{kernel}' and {bandwidth}."
        )
    h = median_distance(data) if bandwidth is None else bandwidth
    return lambda distance: (-(distance / h).square() / 2).exp()


def _sum(of_distance: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, chunk: int, *, same: bool = False) -> float:
    """Return the sum of the kernel over all pairs, `chunk` rows at a time; same: x is y, and the diagonal exact."""
    total = 0.0
    for start in range(0, len(x), chunk):
        distance = torch.cdist(x[start : start + chunk], y, compute_mode="use_mm_for_euclid_dist")
        if same:
            distance.diagonal(start).zero_()
        total += float(of_distance(distance).sum())
    return total


def _mean_within(of_distance: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> float:
    """Return the mean of the kernel over pairs of different rows."""
    itself = len(x) * float(of_distance(x.new_zeros(1)))
    return (_sum(of_distance, x, x, chunk, same=True) - itself) / (len(x) * (len(x) - 1))
