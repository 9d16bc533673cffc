"""Reward feedback (ReFL): walk toward data without a gradient, and maximise the reward of one look-ahead from there.

maximise  r(F(x_t, t, 0)) / T - |F(x_t, t, 0) - F_ref(x_t, t, 0)|^2 / 2,  x_t from the map's own jumps, t drawn anew

One jump takes the gradient, from any noise level: cheap, and every length of look-ahead is tuned. The anchor to the
base's look-ahead is no divergence, so that the temperature is nominal. Reference: Xu et al. 2023, arXiv 2304.05977
(ImageReward), algorithm 1, where the look-ahead is the posterior mean.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch

from steerfm.divergence import squared_norm
from steerfm.finetuning.common import Batch, FineTuning, Moves, Tuned
from steerfm.steering.common import check_counts
from steerfm.times import time_grid


@dataclass(frozen=True)
class RewardFeedback(FineTuning):
    """Tune look-aheads from a random one of the `jumps` + 1 times of few jumps, t = 0 left out, the same for all rows.

    The walk there is the tuned map's. Needs a differentiable reward.
    """

    needs_gradient: ClassVar[bool] = True

    jumps: int = 4

    def __post_init__(self) -> None:
        check_counts(jumps=self.jumps)

    @property
    def moves(self) -> Moves:
        return "jumps"

    def __call__(self, batch: Batch) -> Tuned:
        walked = int(self.jumps * batch.draws.common()[0])
        x, grid, condition = batch.normal(), time_grid(self.jumps), batch.condition
        with torch.no_grad():
            for s, t in itertools.pairwise(grid[: walked + 1]):
                x = batch.flow_map.jump(x, s, t, condition)
            x0_reference = batch.reference.look_ahead(x, grid[walked], condition)
        x0 = batch.flow_map.look_ahead(x, grid[walked], condition)
        scores, penalty = batch.scores(x0), squared_norm(x0 - x0_reference) / 2
        loss = -scores.total + batch.temperature * penalty
        return Tuned(loss, x0, scores.total, scores.parts, {"penalty": penalty})
