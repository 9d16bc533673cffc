"""Guidance by draws of x0 given x_t, whose average is the value's gradient; a black box will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from steerfm.distributed import effective_sample_size
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, as_times
from steerfm.steering.common import Run, best, check_counts
from steerfm.steering.guidance import Guidance, Push, check_option, guidance_strength, normalised
from steerfm.steering.posterior import Draws, Glass, gradient_free_drift, posterior_value, value_gradient
from steerfm.types import Condition, State, unsqueeze_like

Gradient = Literal["none", "raw", "normalised"]


@dataclass(frozen=True)
class PosteriorDrawGuidance(Guidance):
    """Push along grad V, estimated from M draws of x0 given x_t at every step.

    draws: how, `Glass`, `Renoised` or `Sighted`. count: M, at least 2 without a gradient. gradient: "none" compares
    the mean of the draws by exp(r / temperature) with their plain mean, and needs no gradient of the reward; "raw"
    differentiates the reward of every draw; "normalised" scales the result for each sample to a root mean square of 1
    (over the temperature). The other options are `Guidance`'s. With exact draws the tilt is met as count and steps
    grow: the bias is O(1 / M), so the temperature is nominal. Costs count times what a draw costs at every step.

    Traced: the mean reward of the draws, the value V, and `effective_draws`, how many of M the mean rests on.
    References: Potaptchik et al. 2026, arXiv 2601.14430; Holderrieth et al. 2026, arXiv 2602.05993.
    """

    count: int = 16
    _: KW_ONLY
    draws: Draws = field(default_factory=Glass)
    gradient: Gradient = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("gradient", self.gradient, get_args(Gradient))
        check_counts(count=self.count)
        if self.count == 1 and self.gradient == "none":
            raise ConfigError(
                "Without a gradient draws are compared with their mean, and one draw is its own: count must be 2 or "
                "more, got 1; or take gradient='raw'."
            )
        if self.gradient != "none" and self.draws.weighted:
            raise ConfigError(
                "A gradient needs draws of equal weight, got weighted ones: gradient='none', Glass(), or "
                "Renoised(weighted=False), which is biased."
            )

    @property
    def needs_gradient(self) -> bool:
        return self.gradient != "none"

    @property
    def maps(self) -> Sequence[FlowMap]:
        return self.draws.maps

    def push(self, run: Run, x: State, t: float, step: float, draw: int) -> Push:
        pairs, path, time = len(x), run.flow_map.path, as_times(t, x)
        known = torch.stack([x.repeat_interleave(self.count, 0), run.noise(self.count, "posterior", draw)], 1)

        def drawn(known: State, condition: Condition | None) -> State:
            return self.draws.draw(run.flow_map, known[:, 0], t, known[:, 1], condition)

        def weighed(known: State, condition: Condition | None) -> Tensor:
            return self.draws.log_weights(run.flow_map, known[:, 0], t, known[:, 1], known[:, 2], condition)

        if self.gradient == "none":
            x0 = run.rows(drawn, known)
            values = run.rewards(x0)
            log_weights = run.rows(weighed, torch.cat([known, x0[:, None]], 1)).double().reshape(pairs, -1)
            r = values.double().reshape(pairs, -1) / self.temperature
            drift = gradient_free_drift(path, time, x0.reshape(pairs, -1, *x.shape[1:]), r, log_weights)
        else:
            x0, values, gradients = run.reward_gradient(known, drawn)
            r = values.double().reshape(pairs, -1) / self.temperature
            log_weights = torch.zeros_like(r)
            gradient = value_gradient(r, gradients[:, 0].reshape(pairs, -1, *x.shape[1:]))
            gradient = normalised(gradient) if self.gradient == "normalised" else gradient
            strength = guidance_strength(path, time, step, "posterior_mean")
            drift = unsqueeze_like(strength / self.temperature, x) * gradient
        tilted = r + log_weights
        seen = {
            "reward": (log_weights.softmax(1) * values.reshape(pairs, -1)).sum(1),
            "value": posterior_value(r, log_weights),
            "effective_draws": effective_sample_size(tilted),
            "look_ahead": best(tilted, x0),
        }
        return Push(drift, seen)
