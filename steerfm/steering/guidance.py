"""Gradient guidance of the ODE, through the flow map's look-ahead or through the posterior mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steerfm.errors import ConfigError
from steerfm.flow_map import as_times
from steerfm.paths import Path
from steerfm.steering.common import Outcome, Run, Steering, check_counts, check_temperature
from steerfm.times import time_grid
from steerfm.types import State, Times, Values, unsqueeze_like

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
class LookAheadGuidance(Steering):
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
        super().__post_init__()
        check_counts(steps=self.steps)
        check_temperature(self.temperature)
        if self.clean not in ("look_ahead", "posterior_mean"):
            raise ConfigError(f"clean is 'look_ahead' or 'posterior_mean', got '{self.clean}'.")

    @property
    def needs_gradient(self) -> bool:
        return True

    def steer(self, run: Run) -> Outcome:
        """Carry one state a pair from noise to data."""
        x = run.noise()
        for _, s, t in run.steps(time_grid(self.steps)):
            clean, values, drift = self._drift(run, x, s, s - t)
            run.record(reward=values, look_ahead=clean)
            x = run.jump(x, s, t) + (s - t) * drift
        return Outcome(x, note="temperature is nominal: guidance without weights is biased")

    def _drift(self, run: Run, x: State, t: float, step: float) -> tuple[State, Values, State]:
        """Return the clean prediction, its reward (B,) and guidance's share of the reverse-time drift."""
        flow_map = run.flow_map
        predict = flow_map.look_ahead if self.clean == "look_ahead" else flow_map.denoise
        clean, values, gradient = run.reward_gradient(x, lambda x, condition: predict(x, t, condition))
        strength = guidance_strength(flow_map.path, as_times(t, x), step, self.clean)
        return clean, values, unsqueeze_like(strength / self.temperature, x) * gradient
