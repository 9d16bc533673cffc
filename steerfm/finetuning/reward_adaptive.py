"""Reward-adaptive matching: the base's velocity, moved by how the reward goes with the tangent.

target = v_ref(x_t) + sg[(r(x0) - mean r) / T (w - v_theta(x_t))],  x0 from the map that is tuned

The mean of the second term is Cov(r / T, w | x_t), the first order of the tilt's own covariance: exact for a linear
reward on a Gaussian, biased otherwise. r is centred among the samples of one prompt; rewards of any sign and any kind
will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.finetuning.common import Batch, FineTuning, Tuned, by_row, compared, draws_of, renoised
from steerfm.objectives.weights import mean_square
from steerfm.steering.common import check_counts
from steerfm.types import unsqueeze_like


@dataclass(frozen=True)
class RewardAdaptive(FineTuning):
    """Match on samples of the tuned map in `jumps` jumps, at `repeats` noisy states of each; biased."""

    jumps: int = 4
    repeats: int = 4

    def __post_init__(self) -> None:
        check_counts(jumps=self.jumps, repeats=self.repeats)

    def __call__(self, batch: Batch) -> Tuned:
        x0, scores = draws_of(batch.flow_map, batch, self.jumps)
        centred = (scores.total - compared(scores.total, batch.prompts).mean) / batch.temperature
        x_t, t, w = renoised(batch, x0, self.repeats)
        condition, pull = batch.times(self.repeats), centred.repeat_interleave(self.repeats)
        v = batch.flow_map.velocity(x_t, t, condition)
        with torch.no_grad():
            target = batch.reference.velocity(x_t, t, condition) + unsqueeze_like(pull, w) * (w - v)
        return Tuned(by_row(mean_square(v - target), self.repeats), x0, scores.total, scores.parts)
