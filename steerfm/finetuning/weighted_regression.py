"""Weighted regression: flow matching on the base's samples, each weighed, or taken, by exp(r / temperature).

L = rho |v_theta(x_t) - w|^2,  rho = exp(r(x0) / T) over its mean,  x0 from the base

Its optimum E[rho w | x_t] / E[rho | x_t] is the velocity of the tilt: importance sampling, amortised, and as good as
that: the figure "effective_share" says how many of the draws count. Any reward will do. With a pool, rho is the chance
of a row in place of its weight. References: Peng et al. 2019, arXiv 1910.00177 (reward-weighted regression); Zhang et
al. 2025, arXiv 2503.04975 (energy-weighted flow matching); for the pool `steerfm.finetuning.pools`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
from steerfm.finetuning.pools import taken
from steerfm.objectives.weights import mean_square
from steerfm.steering.common import check_counts


@dataclass(frozen=True)
class WeightedRegression(FineTuning):
    """Regress on draws of the base in `jumps` jumps, weighed by exp(r / T), at `repeats` noisy states of each.

    Weights are normalised among the draws of one prompt, which biases them by the inverse of their number: state many
    samples a prompt. Or give a pool: so many draws of each prompt are made and scored once, kept in the machine's
    memory, and taken by their weights, so that a step pays for no draws and all its rows count. For few prompts; with a
    thousand draws that count, a small network does not learn them by heart in a thousand steps.
    """

    jumps: int = 4
    repeats: int = 4
    pool: int | None = None

    def __post_init__(self) -> None:
        check_counts(jumps=self.jumps, repeats=self.repeats, pool=1 if self.pool is None else self.pool)

    def __call__(self, batch: Batch) -> Tuned:
        if self.pool is None:
            x0, scores = draws_of(batch.reference, batch, self.jumps)
            rho = exponential_weights(scores.total, batch.temperature, batch.prompts)
            share, target = effective_share(rho).expand(len(x0)), None
        else:
            x0, scores, share = taken(batch, self.pool, self.jumps)
            rho, target = torch.ones_like(scores.total), x0
        x_t, t, w = renoised(batch, x0, self.repeats)
        gap = by_row(mean_square(batch.flow_map.velocity(x_t, t, batch.times(self.repeats)) - w), self.repeats)
        return Tuned(rho * gap, None, scores.total, scores.parts, {"effective_share": share}, target)
