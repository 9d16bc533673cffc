"""Guidance as optimal control: the least push that lifts the reward at the end, found anew at every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.solvers import shares
from steerfm.steering.common import Outcome, Run, Steering, check_counts
from steerfm.steering.guidance import Gradient, check_option, check_window, itself, normalised
from steerfm.times import time_grid
from steerfm.types import Condition, State, Values

Variant = Literal["jacobian", "endpoint"]


@dataclass(frozen=True)
class FlowMapControl(Steering):
    """Steer the flow by a = strength grad_x r(F(x, t, 0)), the control of dx = (-v + a) dtau to first order.

    What it makes large is strength r(x0) - (integral of |a|^2) / 2, for each start on its own: a pull toward high
    reward with no tilt as its target, hence a strength and no temperature. Each step counts the reward anew and not
    what was paid before, so that a large strength overshoots the optimum.

    variant: "jacobian" differentiates the look-ahead; "endpoint" climbs from the look-ahead L to a better end z, by
    `inner` steps of size strength along grad r, and moves by sigma(s) alpha(t) (z - L) (linear: s (1 - t)), without a
    backward pass of the map and not in proportion to the step. inner: gradient steps each step; at the end each
    multiplies the distance to a bowl's best by 1 - strength curvature, so that with two or more a strength above
    2 / curvature diverges (with one, which moves by a share of it, a few times that). window: the lowest
    and highest source time at which it acts. gradient: "raw", or "normalised" to a root mean square of 1 for each
    sample. Needs a differentiable reward. Reference: Huang et al. 2026, arXiv 2604.27147 (FMRG-J and FMRG-E).
    """

    steps: int = 16
    strength: float = 1.0
    variant: Variant = "jacobian"
    inner: int = 1
    window: tuple[float, float] = (0.0, 1.0)
    gradient: Gradient = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(steps=self.steps, inner=self.inner)
        check_option("variant", self.variant, get_args(Variant))
        check_option("gradient", self.gradient, get_args(Gradient))
        check_window(self.window)
        if not self.strength > 0:
            raise ConfigError(f"strength must be positive, got {self.strength}: it multiplies the reward's gradient.")

    @property
    def needs_gradient(self) -> bool:
        return True

    def steer(self, run: Run) -> Outcome:
        """Carry one state a pair from noise to data."""
        x = run.noise()
        for _, s, t in run.steps(time_grid(self.steps)):
            shift = torch.zeros_like(x)
            if self.window[0] <= s <= self.window[1]:
                move = self._through_the_map if self.variant == "jacobian" else self._at_the_end
                clean, values, shift = move(run, x, s, t)
                run.record(reward=values, look_ahead=clean)
            x = run.jump(x, s, t) + shift
        return Outcome(x, note="strength is no temperature: control climbs the reward, its target is not a tilt")

    def _through_the_map(self, run: Run, x: State, s: float, t: float) -> tuple[State, Values, State]:
        """Return the last look-ahead, its reward, and the sum of strength (s - t) grad r(F(x, s, 0)), x moving on."""
        clean, values, gradient = run.reward_gradient(x, partial(_look_ahead, run.flow_map, s))
        shift = self._scaled(gradient, s - t)
        for _ in range(self.inner - 1):
            clean, values, gradient = run.reward_gradient(x + shift, partial(_look_ahead, run.flow_map, s))
            shift = shift + self._scaled(gradient, s - t)
        return clean, values, shift

    def _at_the_end(self, run: Run, x: State, s: float, t: float) -> tuple[State, Values, State]:
        """Return the look-ahead, its reward, and sigma(s) alpha(t) times the climb from there."""
        clean, values, gradient = run.reward_gradient(run.look_ahead(x, s), itself)
        climb = self._scaled(gradient, 1.0)
        for _ in range(self.inner - 1):
            climb = climb + self._scaled(run.reward_gradient(clean + climb, itself)[2], 1.0)
        path = run.flow_map.path
        return clean, values, shares(path, s)[1] * shares(path, t)[0] * climb

    def _scaled(self, gradient: State, step: float) -> State:
        gradient = normalised(gradient) if self.gradient == "normalised" else gradient
        return step * self.strength * gradient


def _look_ahead(flow_map: FlowMap, s: float, x: State, condition: Condition | None) -> State:
    return flow_map.look_ahead(x, s, condition)
