"""Two leaps (LeapAlign): from a random time of the sampler to another, and from there to data, both with gradients.

x_s by the map's own jumps without a gradient;   x_t = F(x_s, s, t);   x0 = F(c x_t + (1 - c) sg x_t, t, 0)
maximise  r(x0) / T - |x0 - x0_ref|^2 / 2

Two jumps reach the parts of sampling that decide the layout, at the memory of two. c in [0, 1] discounts the gradient
that passes through both, which explodes first. x0_ref: the base's two leaps from the same x_s, an anchor and no
divergence; the temperature is nominal. Reference: Liang et al. 2026, arXiv 2604.15311, where a leap is a long Euler
step; a flow map's leaps end where sampling does, so that none needs a weight for how far off it is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch

from steerfm.divergence import squared_norm
from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Moves, Tuned
from steerfm.flow_map import FlowMap
from steerfm.times import time_grid
from steerfm.types import State


@dataclass(frozen=True)
class LeapAlign(FineTuning):
    """Tune two leaps between random times of `jumps` equal jumps, the same for all rows; discount: c in [0, 1].

    Needs a differentiable reward.
    """

    needs_gradient: ClassVar[bool] = True

    jumps: int = 8
    discount: float = 0.5

    def __post_init__(self) -> None:
        if self.jumps < 2 or not 0 <= self.discount <= 1:
            raise ConfigError(
                "Two leaps lie between three times, and a discount in [0, 1]: got "
                f"jumps={self.jumps}, at least 2, and discount={self.discount}."
            )

    @property
    def moves(self) -> Moves:
        return "jumps"

    def __call__(self, batch: Batch) -> Tuned:
        grid, (first, second) = time_grid(self.jumps), batch.draws.common(2)
        i = int((self.jumps - 1) * first)
        j = i + 1 + int((self.jumps - 1 - i) * second)
        x, condition = batch.normal(), batch.condition
        with torch.no_grad():
            for s, t in itertools.pairwise(grid[: i + 1]):
                x = batch.flow_map.jump(x, s, t, condition)
            x0_reference = self._leaps(batch, batch.reference, x, grid[i], grid[j])
        x0 = self._leaps(batch, batch.flow_map, x, grid[i], grid[j])
        scores, penalty = batch.scores(x0), squared_norm(x0 - x0_reference) / 2
        loss = -scores.total + batch.temperature * penalty
        return Tuned(loss, x0, scores.total, scores.parts, {"penalty": penalty})

    def _leaps(self, batch: Batch, flow_map: FlowMap, x: State, s: float, t: float) -> State:
        x_t = flow_map.jump(x, s, t, batch.condition)
        return flow_map.look_ahead(torch.lerp(x_t.detach(), x_t, self.discount), t, batch.condition)
