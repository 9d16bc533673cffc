"""Weighted regression: flow matching on the base's samples, each weighed by exp(r / temperature).

L = rho |v_theta(x_t) - w|^2,  rho = exp(r(x0) / T) over its mean,  x0 from the base

Its optimum E[rho w | x_t] / E[rho | x_t] is the velocity of the tilt: importance sampling, amortised, and as good as
that: the figure "effective_share" says how many of the draws count. Any reward will do. References: Peng et al. 2019,
arXiv 1910.00177 (reward-weighted regression); Zhang et al. 2025, arXiv 2503.04975 (energy-weighted flow matching).
"""

from __future__ import annotations

from dataclasses import dataclass

from steerfm.finetuning.common import (
    Batch,
    FineTuning,
    Tuned,
    by_row,
    draws_of,
    effective_share,
    exponential_weights,
    renoised,
)
from steerfm.objectives.weights import mean_square
from steerfm.steering.common import check_counts


@dataclass(frozen=True)
class WeightedRegression(FineTuning):
    """Regress on draws of the base in `jumps` jumps, weighed by exp(r / T), at `repeats` noisy states of each.

    Weights are normalised among the draws of one prompt, which biases them by the inverse of their number: state many
    samples a prompt.
    """

    jumps: int = 4
    repeats: int = 4

    def __post_init__(self) -> None:
        check_counts(jumps=self.jumps, repeats=self.repeats)

    def __call__(self, batch: Batch) -> Tuned:
        x0, scores = draws_of(batch.reference, batch, self.jumps)
        rho = exponential_weights(scores.total, batch.temperature, batch.prompts)
        x_t, t, w = renoised(batch, x0, self.repeats)
        gap = mean_square(batch.flow_map.velocity(x_t, t, batch.times(self.repeats)) - w)
        share = effective_share(rho).expand(len(x0))
        return Tuned(rho * by_row(gap, self.repeats), None, scores.total, scores.parts, {"effective_share": share})
