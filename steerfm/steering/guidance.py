"""Guidance: the reward's gradient, or what stands for it, added to the drift of one state a pair.

With the value V_t(x) = log E[exp(r(x0) / temperature) | x_t = x] an extra reverse-time drift eta grad V of the ODE, or
(eta + g^2/2) grad V of the SDE, leads to the tilt exactly. V is not known: r(F(x, t, 0)) or r(E[x0 | x_t]) stands for
it, without weights that correct the result, which is biased.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.flow_map import as_times
from steerfm.paths import Path
from steerfm.sampling import Noise, sde_step, squared_noise
from steerfm.solvers import noising
from steerfm.steering.common import Outcome, Run, Steering, check_counts, check_temperature
from steerfm.times import time_grid
from steerfm.types import Condition, State, Times, unsqueeze_like

Clean = Literal["look_ahead", "posterior_mean"]
Gradient = Literal["raw", "normalised"]
Through = Literal["network", "identity"]


class Push(NamedTuple):
    """The extra drift in reverse time of the ODE, (B, *dim), and what is traced of the step by name, (B, ...)."""

    drift: State
    seen: dict[str, Tensor]


@dataclass(frozen=True)
class Guidance(Steering):
    """Carry one state a pair from noise to data, pushed on the way; a subclass gives the push, eta grad V.

    steps: of the sampler, each a jump followed by the push. window: the lowest and highest source time at which it
    acts; elsewhere the reward is not asked. power: it is multiplied by t^power. noise: None for the ODE, else the
    noise of the SDE, "gentle" or "memoryless". repeats: how often a step in the window is taken, with fresh noise
    back up in between (time travel: Lugmayr et al. 2022, arXiv 2201.09865; Bansal et al. 2023, arXiv 2302.07121).
    """

    steps: int = 32
    temperature: float = 0.1
    _: KW_ONLY
    window: tuple[float, float] = (0.0, 1.0)
    power: float = 0.0
    noise: Noise | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(steps=self.steps, repeats=self.repeats)
        check_temperature(self.temperature)
        check_window(self.window)
        if self.noise is not None:
            check_option("noise", self.noise, get_args(Noise))

    def push(self, run: Run, x: State, t: float, step: float, draw: int) -> Push:
        """Return the push at time t; step: how far the sampler then goes; draw: a number that no other call has."""
        raise NotImplementedError(f"{type(self).__name__} needs a method push(self, run, x, t, step, draw) -> Push.")

    def steer(self, run: Run) -> Outcome:
        """Carry the states."""
        x = run.noise()
        for i, s, t in run.steps(time_grid(self.steps)):
            if not self.window[0] <= s <= self.window[1]:
                x = self._step(run, x, torch.zeros_like(x), s, t, i * self.repeats)
                continue
            push = None
            for draw in range(i * self.repeats, (i + 1) * self.repeats):
                if push is not None:
                    kept, std = noising(run.flow_map.path, t, s)
                    x = kept * x + std * run.noise(1, "step", 2 * draw + 1)
                push = self.push(run, x, s, s - t, draw)
                x = self._step(run, x, s**self.power * push.drift, s, t, draw)
            if push is not None:
                run.record(**push.seen)
        return Outcome(x, note="temperature is nominal: guidance without weights is biased")

    def _step(self, run: Run, x: State, drift: State, s: float, t: float, draw: int) -> State:
        """Jump from s to t and add the push; in the SDE also the score's drift and the noise, but for the last step."""
        x_next = run.jump(x, s, t) + (s - t) * drift
        if self.noise is None or t == 0:
            return x_next
        times, path = as_times(s, x), run.flow_map.path
        g2 = squared_noise(path, times, s - t, self.noise)
        share = g2 * path.alpha(times) / (2 * path.sigma_determinant(times))  # g^2/2 over eta, 0 where eta is infinite
        score = path.score(x, run.velocity(x, s), times)
        more = unsqueeze_like(g2 / 2, x) * score + unsqueeze_like(share, x) * drift
        return sde_step(x_next, more, g2, s - t, run.noise(1, "step", 2 * draw)).x_next


@dataclass(frozen=True)
class LookAheadGuidance(Guidance):
    """Push along the gradient of r(clean(x_t)) / temperature.

    clean: "look_ahead", F(x, t, 0), or "posterior_mean", E[x0 | x_t] (diffusion posterior sampling, Chung et al. 2022,
    arXiv 2209.14687). gradient: "raw", or "normalised": each sample's is scaled to a root mean square of 1, and the
    temperature is what divides that. through: "network" differentiates the map, "identity" takes its output as
    constant, which saves the backward pass through it. backward: so many steps of size `rate` along the gradient of
    r / temperature then lead from the posterior mean to a better x0, and x_t moves as if that were the mean (the second
    half of universal guidance: Bansal et al. 2023, arXiv 2302.07121, section 3.2): no further passes of the map, a
    reward gradient each. They diverge where rate / temperature exceeds 2 over the reward's curvature. The other options
    are `Guidance`'s. No weights correct the
    drift, so the result is biased: the temperature is a strength in the tilt's units. Needs a differentiable reward.
    Reference: Sabour et al. 2025, arXiv 2511.22688 (look-ahead).
    """

    clean: Clean = "look_ahead"
    _: KW_ONLY
    gradient: Gradient = "raw"
    through: Through = "network"
    backward: int = 0
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("clean", self.clean, get_args(Clean))
        check_option("gradient", self.gradient, get_args(Gradient))
        check_option("through", self.through, get_args(Through))
        if not self.backward >= 0 or not self.rate > 0:
            raise ConfigError(
                f"backward is a number of steps, at least 0, and rate their size, above 0; got {self.backward} and "
                f"{self.rate}."
            )
        if self.backward and self.clean != "posterior_mean":
            raise ConfigError("backward=... moves the posterior mean: add clean='posterior_mean', or leave it at 0.")

    @property
    def needs_gradient(self) -> bool:
        return True

    def push(self, run: Run, x: State, t: float, step: float, draw: int) -> Push:
        def predict(x: State, condition: Condition | None) -> State:
            return self._predict(run, x, t, condition)

        clean, values, gradient = run.reward_gradient(x, predict)
        times, path = as_times(t, x), run.flow_map.path
        strength = guidance_strength(path, times, step, self.clean)
        drift = unsqueeze_like(strength, x) * self._scaled(gradient)
        climb = torch.zeros_like(x)
        for _ in range(self.backward):
            climb = climb + self.rate * self._scaled(run.reward_gradient(clean + climb, itself)[2])
        # At a given x_t another mean x0 means another x1: v changes by -d / sigma of the climb (linear: 1 / t).
        drift = drift + unsqueeze_like(path.determinant(times) / path.sigma(times), x) * climb
        return Push(drift, {"reward": values, "look_ahead": clean})

    def _scaled(self, gradient: State) -> State:
        return (normalised(gradient) if self.gradient == "normalised" else gradient) / self.temperature

    def _predict(self, run: Run, x: State, t: float, condition: Condition | None) -> State:
        """Return the clean prediction; with a constant network dF/dx is 1 and dE[x0 | x_t]/dx sigma' / d."""
        flow_map = run.flow_map
        clean = flow_map.look_ahead if self.clean == "look_ahead" else flow_map.denoise
        if self.through == "network":
            return clean(x, t, condition)
        time = as_times(t, x)
        path = flow_map.path
        slope = torch.ones_like(time) if self.clean == "look_ahead" else path.sigma_dot(time) / path.determinant(time)
        with torch.no_grad():
            constant = clean(x, t, condition)
        return constant + unsqueeze_like(slope, x) * (x - x.detach())


def guidance_strength(path: Path, t: Times, step: float, clean: Clean) -> Times:
    """Return the factor of the reward's gradient in the reverse-time drift of the ODE; (B,).

    Look-ahead: V_t = alpha r(F(x, t, 0)) and a drift of eta grad V give eta alpha = sigma d (linear: t).
    Posterior mean: V_t = r(E[x0 | x_t]), hence eta (linear: t / (1 - t)). At t = 1, where there is no data, eta has
    its pole and the gradient of the exact mean is zero: there the pole is moved out by one step, as in
    Path.memoryless_noise.
    """
    if clean == "look_ahead":
        return path.sigma(t) * path.determinant(t)
    return torch.where(t < 1, path.eta(t), path.memoryless_noise(t, step) / 2)


def itself(x0: State, condition: Condition | None) -> State:
    """Return x0: the clean prediction of a clean state."""
    return x0


def normalised(gradient: State) -> State:
    """Return each sample's gradient at a root mean square of 1; one that is 0 stays 0."""
    square = gradient.flatten(1).square().mean(1)
    return gradient * unsqueeze_like(torch.where(square > 0, square, 1).rsqrt(), gradient)


def check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value is one of those known."""
    if value not in known:
        raise ConfigError(f"{name} is {' or '.join(repr(each) for each in known)}, got '{value}'.")


def check_window(window: tuple[float, float]) -> None:
    """Raise ConfigError unless the window is two times that rise within [0, 1]."""
    if len(window) != 2 or not 0 <= window[0] < window[1] <= 1:
        raise ConfigError(f"window is two times, the lowest and the highest, within [0, 1]; got {list(window)}.")
