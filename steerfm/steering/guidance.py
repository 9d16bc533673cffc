"""Gradient guidance of the ODE, through the flow map's look-ahead or through the posterior mean."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, as_times
from steerfm.paths import Path
from steerfm.sampling import finish, measure, prepare
from steerfm.steering.common import check_counts, check_temperature, ready_reward, value_and_gradient
from steerfm.times import time_grid
from steerfm.types import Condition, Samples, State, Times, unsqueeze_like

Clean = Literal["look_ahead", "posterior_mean"]


def guidance_strength(path: Path, t: Times, step: float, clean: Clean) -> Times:
    """Return the factor of the reward's gradient in the reverse-time drift; (B,).

    Look-ahead: V_t = alpha r(F(x, t, 0)) and a drift of eta grad V give eta alpha = sigma d (linear: t).
    Posterior mean: V_t = r(E[x0 | x_t]), hence eta (linear: t / (1 - t)), its pole at t = 1 moved out by one
    step as in Path.memoryless_noise.
    """
    if clean == "look_ahead":
        return path.sigma(t) * path.determinant(t)
    return path.memoryless_noise(t, step) / 2


@dataclass(frozen=True)
class LookAheadGuidance:
    """Add the gradient of r(clean(x_t)) / temperature to the reverse-time drift of the ODE.

    steps: steps of the sampler, each a jump followed by the guidance's drift. clean: "look_ahead", F(x, t, 0),
    or "posterior_mean", E[x0 | x_t] (diffusion posterior sampling, Chung et al. 2022, arXiv 2209.14687). No
    weights correct the drift, so the result is biased: the temperature is a strength in the tilt's units.
    Needs a differentiable reward. Reference: Sabour et al. 2025, arXiv 2511.22688 (look-ahead).
    """

    steps: int = 32
    temperature: float = 0.1
    clean: Clean = "look_ahead"

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        check_temperature(self.temperature)
        if self.clean not in ("look_ahead", "posterior_mean"):
            raise ConfigError(f"clean is 'look_ahead' or 'posterior_mean', got '{self.clean}'.")

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        reward: Any = None,
        *,
        prompts: Sequence[str] = ("",),
        seeds: Sequence[int] = (0,),
        condition: Condition | None = None,
    ) -> Samples:
        reward = ready_reward(reward, "LookAheadGuidance", needs_gradient=True)
        task = prepare(flow_map, prompts, seeds, condition)
        x, trace = task.x1, []
        grid = time_grid(self.steps)
        with measure(flow_map, reward, len(task.seeds)) as cost:
            for t, t_next in itertools.pairwise(grid):
                values, drift = self._drift(flow_map, reward, x, t, t - t_next, task.condition, task.prompts)
                trace.append(values)
                x = flow_map.jump(x, t, t_next, task.condition) + (t - t_next) * drift
        note = "temperature is nominal: guidance without weights is biased"
        return finish(flow_map, task, x, reward, cost(), trace={"reward": torch.stack(trace, 1)}, note=note)

    def _drift(
        self,
        flow_map: FlowMap,
        reward: Any,
        x: State,
        t: float,
        step: float,
        condition: Condition | None,
        prompts: Sequence[str],
    ) -> tuple[Tensor, State]:
        """Return the reward of the clean prediction (B,) and guidance's share of the reverse-time drift."""
        predict = flow_map.look_ahead if self.clean == "look_ahead" else flow_map.denoise
        _, values, gradient = value_and_gradient(
            lambda state: predict(state, t, condition), reward, flow_map.decode, x, prompts
        )
        strength = guidance_strength(flow_map.path, as_times(t, x), step, self.clean)
        return values, unsqueeze_like(strength / self.temperature, x) * gradient
