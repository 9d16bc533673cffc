"""The Fréchet distance: between two sets of features, each summed up as a Gaussian.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)

With N samples it is biased upward, for an isotropic Gaussian by about tr(C) (D + 5) / (4 N) for each set: compare
figures of one sample size only, and print the floor beside them.

Reference: Dowson & Landau 1982; Heusel et al. 2017, arXiv 1706.08500 (with Inception features: FID).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.metrics.floors import floor_of
from steerfm.metrics.points import as_vectors, same_dimension


@dataclass(frozen=True)
class Statistics:
    """Hold the mean (D,), covariance (D, D) and size of a set of features, in float64."""

    mean: Tensor
    covariance: Tensor
    count: int


def statistics(features: Tensor) -> Statistics:
    """Return the statistics of features (N, *dim), N of at least 2; the covariance divides by N - 1."""
    x = as_vectors(features, least=2, name="A Fréchet distance")
    mean = x.mean(0)
    centred = x - mean
    return Statistics(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(a: Tensor | Statistics, b: Tensor | Statistics) -> float:
    """Return the squared Fréchet distance of two sets of features (N, *dim) and (M, *dim), or of their statistics.

    In float64, by eigenvalues, or by the rows' products where a set has fewer rows than dimensions. It depends on N
    and M: see the module. Raises DataError for sets of different dimension, of fewer than two rows, or with values
    that are not finite.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor) and min(len(a), len(b)) < a[0].numel():
        return _of_few_rows(a, b)
    first = a if isinstance(a, Statistics) else statistics(a)
    second = b if isinstance(b, Statistics) else statistics(b)
    same_dimension(first.mean[None], second.mean[None])
    shift = (first.mean - second.mean).square().sum()
    # tr (C1 C2)^½ = Σ √λ_i of C1^½ C2 C1^½, which is symmetric
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    distance = shift + first.covariance.trace() + second.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _of_few_rows(a: Tensor, b: Tensor) -> float:
    """Return the same without a covariance: with C1 = AᵀA and C2 = BᵀB, tr (C1 C2)^½ sums ABᵀ's singular values."""
    x, y = (as_vectors(each, least=2, name="A Fréchet distance") for each in (a, b))
    same_dimension(x, y)
    A, B = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (x, y))
    shift = (x.mean(0) - y.mean(0)).square().sum()
    distance = shift + A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    return max(float(distance), 0.0)


def frechet_floor(features: Tensor, n: int | None = None, *, repeats: int = 16, seed: int = 0) -> float:
    """Return the mean distance of `n` rows, drawn from features (N, *dim) with replacement, to all of them.

    This is what a perfect generator's n samples would score against this set (n = N by default).
    """
    x = as_vectors(features, least=2, name="A Fréchet floor")
    n = len(x) if n is None else n
    if n < 2:
        raise DataError(f"A Fréchet floor needs n of at least 2, got {n}.")
    whole = statistics(x)  # once, not once a draw
    return floor_of(
        lambda draw, _: frechet_distance(draw, whole), x, n, with_replacement=True, repeats=repeats, seed=seed
    ).mean


def frechet_between_halves(features: Tensor, *, repeats: int = 16, seed: int = 0) -> float:
    """Return the mean distance between two random halves of features (N, *dim), N of at least 4.

    Real against real: above `frechet_floor`, since the halves share nothing and are smaller.
    """
    x = as_vectors(features, least=4, name="A Fréchet distance between halves")
    return floor_of(frechet_distance, x, repeats=repeats, seed=seed).mean
