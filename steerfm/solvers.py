"""Solvers of a velocity, as baselines: Euler, Heun, DDIM, DPM-Solver++(2M) and ancestral sampling.

Plain functions (flow_map, x1, steps, condition) -> x0 for any path. `steps` is a number of equal steps from t = 1
to 0, or the times themselves, falling (steerfm.times: `karras_grid`, `shifted_grid`); what is returned stands at
the last of them. The last three see the map through the posterior mean alone: they keep E[x0 | x_s] and what it
leaves of the noise, and mix both anew for the next time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.paths import Path
from steerfm.times import as_grid
from steerfm.types import Condition, State

NO_DATA = 1e-12  # a smaller share of data is 0 but for rounding: cos(pi / 2) is 6e-17


def euler(flow_map: FlowMap, x1: State, steps: int | Sequence[float], condition: Condition | None = None) -> State:
    """Return x0 by Euler steps of the velocity; one network call a step."""
    x = x1
    for s, t in itertools.pairwise(as_grid(steps)):
        x = x + (t - s) * flow_map.velocity(x, s, condition)
    return x


def heun(flow_map: FlowMap, x1: State, steps: int | Sequence[float], condition: Condition | None = None) -> State:
    """Return x0 by Heun steps of the velocity, the last one Euler's; two network calls a step.

    Reference: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """
    x = x1
    for s, t in itertools.pairwise(as_grid(steps)):
        v = flow_map.velocity(x, s, condition)
        x_next = x + (t - s) * v
        if t > 0:
            v = (v + flow_map.velocity(x_next, t, condition)) / 2
        x = x + (t - s) * v
    return x


def ddim(flow_map: FlowMap, x1: State, steps: int | Sequence[float], condition: Condition | None = None) -> State:
    """Return x0 by DDIM: alpha_t E[x0 | x_s] + sigma_t E[x1 | x_s] at each next time; one network call a step.

    On the linear path this is `euler`, on others not: it is Euler's step of x / alpha in sigma / alpha, and exact
    where the posterior mean does not change. Reference: Song, Meng, Ermon 2021, arXiv 2010.02502, eq. (12).
    """
    x = x1
    for s, t in itertools.pairwise(as_grid(steps)):
        clean = flow_map.denoise(x, s, condition)
        x = _mixed(x, clean, shares(flow_map.path, s), shares(flow_map.path, t))
    return x


def dpm_solver(flow_map: FlowMap, x1: State, steps: int | Sequence[float], condition: Condition | None = None) -> State:
    """Return x0 by DPM-Solver++(2M), of second order in lambda = log(alpha / sigma); one network call a step.

    A DDIM step from the posterior mean led on along its last change, by half a step. Steps from alpha = 0 and to
    sigma = 0 are infinite in lambda; in the limit the mean is held over the first and over the one behind it, and
    the last is DDIM's, as in diffusers. Equal times make the steps at these ends large in lambda: from end to end
    the error falls with log(n) / n^2 on the linear and trigonometric paths, with 1 / n on the variance-preserving.
    Reference: Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """
    x, before, h_before = x1, x1, math.inf  # nothing is known before the first step, which so leads nothing on
    for s, t in itertools.pairwise(as_grid(steps)):
        clean = flow_map.denoise(x, s, condition)
        h = _log_ratio(flow_map.path, t) - _log_ratio(flow_map.path, s)
        led_on = clean + h / (2 * h_before) * (clean - before) if h < math.inf else clean
        x = _mixed(x, led_on, shares(flow_map.path, s), shares(flow_map.path, t))
        before, h_before = clean, h
    return x


def ancestral(
    flow_map: FlowMap,
    x1: State,
    steps: int | Sequence[float],
    condition: Condition | None = None,
    *,
    draw: Callable[[int], State],
    eta: float = 1.0,
) -> State:
    """Return x0 by DDIM steps, part of whose noise is drawn afresh; one network call a step.

    eta: in [0, 1]; 0 is `ddim`, 1 adds the variance of p(x_t | x_s, x0): ancestral sampling, the "Euler ancestral"
    of k-diffusion and diffusers. `draw(step)` gives that step's noise; the step to data adds none.
    Reference: Song, Meng, Ermon 2021, arXiv 2010.02502, eq. (12) and (16), for any path.
    """
    check_share("eta", eta)
    x = x1
    for i, (s, t) in enumerate(itertools.pairwise(as_grid(steps))):
        clean = flow_map.denoise(x, s, condition)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = shares(flow_map.path, s), shares(flow_map.path, t)
        fresh = eta * sigma_t * math.sqrt(1 - (alpha_s * sigma_t / (alpha_t * sigma_s)) ** 2)
        x = _mixed(x, clean, (alpha_s, sigma_s), (alpha_t, math.sqrt(sigma_t**2 - fresh**2)))
        if fresh > 0:
            x = x + fresh * draw(i)
    return x


def shares(path: Path, t: float) -> tuple[float, float]:
    """Return alpha(t) and sigma(t) as numbers, worked out in float64 whatever the state's type."""
    time = torch.tensor(t, dtype=torch.float64)
    return float(path.alpha(time)), float(path.sigma(time))


def noising(path: Path, s: float, t: float) -> tuple[float, float]:
    """Return (kept, std) of p(x_t | x_s) = N(kept x_s, std^2 I) for s <= t, the path's way back up to noise."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = shares(path, s), shares(path, t)
    kept = alpha_t / alpha_s
    return kept, math.sqrt(max(sigma_t**2 - (kept * sigma_s) ** 2, 0.0))


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless `value` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is the share of fresh noise and must lie in [0, 1], got {value}.")


def _mixed(x: State, clean: State, source: tuple[float, float], target: tuple[float, float]) -> State:
    """Return alpha_t clean + sigma_t noise, where x = alpha_s clean + sigma_s noise; shares are (alpha, sigma)."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = source, target
    return (sigma_t / sigma_s) * x + (alpha_t - sigma_t * alpha_s / sigma_s) * clean


def _log_ratio(path: Path, t: float) -> float:
    """Return lambda = log(alpha / sigma), half the log of the signal-to-noise ratio; infinite where one is 0."""
    alpha, sigma = shares(path, t)
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > NO_DATA else -math.inf
