"""Precision and recall, density and coverage: do samples look real, and is all of the data there.

A set's support is taken to be the union of balls around its points, each reaching to the k-th nearest other point.

References: Kynkäänniemi et al. 2019, arXiv 1904.06991 (precision, recall); Naeem et al. 2020, arXiv 2002.09797
(density, coverage).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.metrics.points import as_vectors, same_dimension


@dataclass(frozen=True)
class PrecisionRecall:
    """Hold how well samples lie on the data, and how well they reach all of it.

    precision: share of samples in a ball of the data. recall: share of data in a ball of the samples. density:
    how many balls of the data hold a sample, over k; may exceed 1. coverage: share of the data's balls that hold a
    sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int
    samples: int
    reference: int


def precision_recall(samples: Tensor, data: Tensor, k: int = 3, *, chunk: int = 1024) -> PrecisionRecall:
    """Return precision, recall, density and coverage of features (N, *dim) against data (M, *dim); both above k rows.

    All of them depend on N, M and k: compare at equal sizes. A perfect generator has density 1 on average and
    coverage `expected_coverage(N, M, k)`, whatever the distribution; its precision and recall are below 1 by as
    much as `floor_of` says. One outlier of the data has a huge ball, which raises precision; density less so.
    Distances are exact, so that a copy counts: N M D operations, and memory for `chunk` x max(N, M) numbers.
    """
    x, y = (as_vectors(each, least=k + 1, name="A precision and recall") for each in (samples, data))
    same_dimension(x, y)
    if k < 1:
        raise DataError(f"Precision and recall need k of at least 1, got {k}.")
    radius_x, radius_y = _radii(x, k, chunk), _radii(y, k, chunk)
    balls = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # of the data, that hold each sample
    covered = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    reached = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        distance = _distances(x[rows], y)
        inside = distance <= radius_y
        balls[rows] = inside.sum(1).double()
        covered |= inside.any(0)
        reached |= (distance <= radius_x[rows, None]).any(0)
    return PrecisionRecall(
        precision=float((balls > 0).double().mean()),
        recall=float(reached.double().mean()),
        density=float(balls.mean()) / k,
        coverage=float(covered.double().mean()),
        k=k,
        samples=len(x),
        reference=len(y),
    )


def expected_coverage(samples: int, reference: int, k: int = 3) -> float:
    """Return the mean coverage of a perfect generator: one less the chance that a point's k nearest are all data.

    1 - Π_j (M - 1 - j) / (M + N - 1 - j) for j < k; exact for any density without ties. Reference: Naeem et al.
    2020, arXiv 2002.09797, for N = M.
    """
    missed = 1.0
    for j in range(k):
        missed *= (reference - 1 - j) / (reference + samples - 1 - j)
    return 1 - missed


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # the matrix-product formula would let rounding decide whether the k-th neighbour lies in its own ball
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Return the distance (N,) of each row to its k-th nearest other row."""
    found = []
    for start in range(0, len(x), chunk):
        distance = _distances(x[start : start + chunk], x)
        distance.diagonal(start).fill_(torch.inf)
        found.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(found)
