"""How far samples are from data, and from each other; every figure depends on how many samples there are."""

from steerfm.metrics.diversity import mean_pairwise_distance, nearest_distance
from steerfm.metrics.frechet import (
    Statistics,
    frechet_between_halves,
    frechet_distance,
    frechet_floor,
    statistics,
)
from steerfm.metrics.histogram import histogram_counts, histogram_kl, histogram_kl_floor
from steerfm.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "Statistics",
    "frechet_between_halves",
    "frechet_distance",
    "frechet_floor",
    "histogram_counts",
    "histogram_kl",
    "histogram_kl_floor",
    "mean_pairwise_distance",
    "nearest_distance",
    "sliced_wasserstein",
    "statistics",
]
