"""How different samples are from each other, and how far from data.

Pairwise distance alone can be met by noise: always show a distance to data beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerfm.metrics.points import as_vectors, same_dimension


def mean_pairwise_distance(x: Tensor, *, chunk: int = 1024) -> float:
    """Return the mean Euclidean distance over all pairs of different rows of x (N, *dim), N of at least 2.

    Exact, in float64, `chunk` rows at a time; no row is compared with itself, so that the figure does not depend
    on N but for its sampling error (about one part in √N). It has no floor: the yardstick is real data's own
    figure, and both too little and too much are wrong.
    """
    vectors = as_vectors(x, least=2, name="A mean pairwise distance")
    vectors = vectors - vectors.mean(0)  # so that the matrix-product formula loses nothing to cancellation
    total = 0.0
    for start in range(0, len(vectors), chunk):
        rows = vectors[start : start + chunk]
        distances = torch.cdist(rows, vectors, compute_mode="use_mm_for_euclid_dist")
        distances.diagonal(start).zero_()
        total += float(distances.sum())
    return total / (len(vectors) * (len(vectors) - 1))


def nearest_distance(x: Tensor, data: Tensor, *, chunk: int = 1024) -> Tensor:
    """Return the Euclidean distance of each row of x (N, *dim) to the nearest row of data (M, *dim); float64 (N,).

    It falls as M grows: compare figures against one data set only. Zero means a copy of the data. Its floor is the
    distance of real data that are not in the set, `floor_of(lambda a, b: nearest_distance(a, b).mean(), data)`.
    """
    vectors, known = as_vectors(x, name="A nearest distance"), as_vectors(data, name="A nearest distance's data")
    same_dimension(vectors, known)
    # the matrix-product formula would give a copy a distance of about 1e-8, not zero
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(rows, known, compute_mode=exact).amin(1) for rows in vectors.split(chunk)])
