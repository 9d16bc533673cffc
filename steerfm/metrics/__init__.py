"""How far samples are from data and from each other, and whether a flow map is still one.

Every figure depends on how many samples there are: `floor_of` says what real data would score at that size.
"""

from steerfm.metrics.diversity import mean_pairwise_distance, nearest_distance
from steerfm.metrics.floors import Floor, floor_of
from steerfm.metrics.flow import EndpointAgreement, endpoint_agreement, semigroup_defect, straightness
from steerfm.metrics.frechet import (
    Statistics,
    frechet_between_halves,
    frechet_distance,
    frechet_floor,
    statistics,
)
from steerfm.metrics.histogram import histogram_counts, histogram_kl, histogram_kl_floor
from steerfm.metrics.kernel_distance import KernelDistance, kernel_distance
from steerfm.metrics.mmd import median_distance, squared_mmd
from steerfm.metrics.precision_recall import PrecisionRecall, expected_coverage, precision_recall
from steerfm.metrics.prompt_following import PromptFollowing, prompt_following
from steerfm.metrics.sliced_wasserstein import sliced_wasserstein
from steerfm.metrics.vendi import vendi_score, vendi_score_of

__all__ = [
    "EndpointAgreement",
    "Floor",
    "KernelDistance",
    "PrecisionRecall",
    "PromptFollowing",
    "Statistics",
    "endpoint_agreement",
    "expected_coverage",
    "floor_of",
    "frechet_between_halves",
    "frechet_distance",
    "frechet_floor",
    "histogram_counts",
    "histogram_kl",
    "histogram_kl_floor",
    "kernel_distance",
    "mean_pairwise_distance",
    "median_distance",
    "nearest_distance",
    "precision_recall",
    "prompt_following",
    "semigroup_defect",
    "sliced_wasserstein",
    "squared_mmd",
    "statistics",
    "straightness",
    "vendi_score",
    "vendi_score_of",
]
