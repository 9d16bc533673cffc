"""Tilt matching: the regression of the base's own draws, weighed by exp(r / temperature), with less variance.

target = v_ref(x_t) + (rho - 1) (w - sg v_theta(x_t)),  rho = exp(r(x0) / T) over its mean,  x0 from the base

At the velocity of the tilt, v* = E[rho w | x_t] / E[rho | x_t], the mean of the target is v* itself, whatever divides
rho. It is weighted regression with a control variate: the gradient differs by w - v_ref, whose mean is 0, so that
draws of a reward near the mean say nothing in place of noise. Reference: Potaptchik, Lee, Albergo 2025, arXiv
2512.21829.
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
from steerfm.objectives.weights import mean_square
from steerfm.steering.common import check_counts
from steerfm.types import unsqueeze_like


@dataclass(frozen=True)
class TiltMatching(FineTuning):
    """Match the tilt's velocity on draws of the base in `jumps` jumps, at `repeats` noisy states of each.

    As weighted regression, it needs draws that count: see the figure "effective_share". Any reward will do.
    """

    jumps: int = 4
    repeats: int = 4

    def __post_init__(self) -> None:
        check_counts(jumps=self.jumps, repeats=self.repeats)

    def __call__(self, batch: Batch) -> Tuned:
        x0, scores = draws_of(batch.reference, batch, self.jumps)
        rho = exponential_weights(scores.total, batch.temperature, batch.prompts)
        x_t, t, w = renoised(batch, x0, self.repeats)
        condition, more = batch.times(self.repeats), rho.repeat_interleave(self.repeats) - 1
        v = batch.flow_map.velocity(x_t, t, condition)
        with torch.no_grad():
            target = batch.reference.velocity(x_t, t, condition) + unsqueeze_like(more, w) * (w - v)
        share = effective_share(rho).expand(len(x0))
        loss = by_row(mean_square(v - target), self.repeats)
        return Tuned(loss, None, scores.total, scores.parts, {"effective_share": share})
