"""The Kullback-Leibler divergence of two-dimensional histograms, for densities with hard edges (a checkerboard)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.metrics.points import as_vectors

HALF_A_POINT = 0.5  # added to every bin of the samples (Jeffreys), so that an empty one does not make it infinite


def histogram_counts(points: Tensor, bins: int = 40, bounds: tuple[float, float] = (-1.25, 1.25)) -> Tensor:
    """Return how many points (N, 2) fall into each of bins x bins squares, and last outside; float64 (bins² + 1,)."""
    x = as_vectors(points, name="A histogram")
    if x.shape[1] != 2 or bins < 1 or not bounds[0] < bounds[1]:
        got = f"{tuple(points.shape)}, {bins} and {bounds}"
        raise DataError(f"A histogram needs points (N, 2), bins and bounds (low, high), got {got}.")
    place = ((x - bounds[0]) / (bounds[1] - bounds[0]) * bins).floor().long()
    inside = ((place >= 0) & (place < bins)).all(1)
    cell = torch.where(inside, place[:, 0] * bins + place[:, 1], bins * bins)
    return torch.bincount(cell, minlength=bins * bins + 1).double()


def histogram_kl(
    samples: Tensor, reference: Tensor, bins: int = 40, bounds: tuple[float, float] = (-1.25, 1.25)
) -> float:
    """Return KL(reference ‖ samples) in nats between histograms.

    reference: points (M, 2), or the weight of every bin, (bins, bins) or as `histogram_counts` returns it. Bins
    that the samples left empty count half a point, so the figure stays finite but depends on how many samples
    there are: print `histogram_kl_floor` beside it. Figures of other protocols do not compare.
    """
    counts = histogram_counts(samples, bins, bounds) + HALF_A_POINT
    p, q = _shares(reference, bins, bounds), counts / counts.sum()
    return float(torch.xlogy(p, p / q).sum())


def histogram_kl_floor(
    reference: Tensor,
    n: int,
    bins: int = 40,
    bounds: tuple[float, float] = (-1.25, 1.25),
    *,
    repeats: int = 16,
    seed: int = 0,
) -> float:
    """Return the mean divergence that `n` points drawn from the reference itself would have.

    A reference given as points is redrawn too, since it is as uncertain as the samples are.
    """
    generator, p = np.random.default_rng(seed), _shares(reference, bins, bounds).numpy()
    redrawn = len(reference) if _holds_points(reference, bins) else 0
    found = []
    for _ in range(repeats):
        counts = torch.from_numpy(generator.multinomial(n, p)) + HALF_A_POINT
        of = torch.from_numpy(generator.multinomial(redrawn, p) / redrawn if redrawn else p)
        found.append(float(torch.xlogy(of, of / (counts / counts.sum())).sum()))
    return float(np.mean(found))


def _holds_points(reference: Tensor, bins: int) -> bool:
    """Say whether a reference is a list of points and not a table of bins."""
    return reference.ndim == 2 and reference.shape[1] == 2 and tuple(reference.shape) != (bins, bins)


def _shares(reference: Tensor, bins: int, bounds: tuple[float, float]) -> Tensor:
    """Return the share (bins² + 1,) of every bin, summing to one."""
    if _holds_points(reference, bins):
        weights = histogram_counts(reference, bins, bounds)
    else:
        weights = reference.detach().cpu().double().flatten()
        if len(weights) == bins * bins:
            weights = torch.cat([weights, weights.new_zeros(1)])
    if len(weights) != bins * bins + 1 or not bool((weights >= 0).all()) or not weights.sum() > 0:
        raise DataError(
            f"A reference needs points (M, 2), or one weight of at least 0 for each of {bins} x {bins} bins, "
            f"got the shape {tuple(reference.shape)}."
        )
    return weights / weights.sum()
