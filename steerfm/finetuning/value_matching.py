"""Value-gradient matching: regress the velocity on v_ref - eta grad V, the value's gradient by posterior draws.

V_t(x) = log E[exp(r(x0) / T) | x_t = x] of the base is estimated from M draws of x0 given each noisy state; then
-eta grad V is (mean of x0 - mean of x0 weighed by exp(r / T)) d / sigma, without a gradient of r
(`steerfm.steering.posterior.gradient_free_drift`). The noisy states are those of the tuned map's own samples: where it
goes, not where the base went. As good as the draws, and low by O(1 / M). References: Liu et al. 2025, arXiv 2512.05116
(VGG-Flow: the match; there a second network learns the gradient); Potaptchik et al. 2026, arXiv 2601.14430 (the draws).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Tuned, draws_of
from steerfm.flow_map import as_times
from steerfm.objectives.weights import mean_square
from steerfm.reward import Scores
from steerfm.steering.common import check_counts
from steerfm.steering.posterior import Draws, Glass, gradient_free_drift
from steerfm.types import State, Values

EARLIEST = 0.02  # below this time a posterior is a point, and its draws are rounding


@dataclass(frozen=True)
class ValueMatching(FineTuning):
    """Match the value's gradient from `draws`, `count` of them at each noisy state; any reward will do.

    levels: times a batch is spread over, one random time in each of so many equal intervals. jumps: in which the tuned
    map's samples are drawn. Consistent as count and the steps of the draws grow.
    """

    count: int = 16
    draws: Draws = field(default_factory=Glass)
    levels: int = 8
    jumps: int = 4

    def __post_init__(self) -> None:
        check_counts(levels=self.levels, jumps=self.jumps)
        if self.count < 2:
            raise ConfigError("One posterior draw says nothing of the value's gradient: count must be 2 or more.")

    def __call__(self, batch: Batch) -> Tuned:
        x0, scores = draws_of(batch.flow_map, batch, self.jumps)
        x1, noise, flow_map = batch.normal(), batch.normal(self.count), batch.flow_map
        rows = torch.tensor(batch.draws.rows)
        losses = torch.zeros_like(scores.total)
        for level, u in enumerate(batch.draws.common(self.levels)):
            own = (rows % self.levels == level).nonzero()[:, 0].to(x0.device)
            if not len(own):
                continue
            t = EARLIEST + (1 - EARLIEST) * (level + u) / self.levels
            times = as_times(t, x1[own])
            x_t = flow_map.path.interpolate(x0[own], x1[own], times)
            target = self._target(batch, x_t, t, own, noise.unflatten(0, (-1, self.count))[own].flatten(0, 1))
            condition = None if batch.condition is None else batch.condition.select(own)
            losses = losses.index_add(0, own, mean_square(flow_map.velocity(x_t, times, condition) - target))
        return Tuned(losses, x0, scores.total, scores.parts)

    @torch.no_grad()
    def _target(self, batch: Batch, x_t: State, t: float, own: torch.Tensor, noise: State) -> State:
        """Return v_ref - eta grad V at x_t, the states of the batch's rows `own`."""
        reference, condition = batch.reference, batch.condition
        one = None if condition is None else condition.select(own)
        every = own.repeat_interleave(self.count)
        all_of = None if condition is None else condition.select(every)
        x = x_t.repeat_interleave(self.count, 0)
        x0 = self.draws.draw(reference, x, t, noise, all_of)
        log_weights = self.draws.log_weights(reference, x, t, noise, x0, all_of)
        prompts = [batch.prompts[i] for i in every.tolist()]
        scores: Scores = batch.reward(batch.flow_map.decode(x0), prompts)

        def of_each(values: Values) -> Values:
            return values.unflatten(0, (-1, self.count))

        drift = gradient_free_drift(
            reference.path,
            as_times(t, x_t),
            of_each(x0),
            of_each(scores.total / batch.temperature),
            of_each(log_weights),
        )
        return reference.velocity(x_t, t, one) - drift
