"""Draws of clean data x0 given a state x_t, and what they say of the value V_t(x) = log E[exp r(x0) | x_t = x].

GLASS draws them with the velocity alone: x0 is seen twice, in x_t and in an inner state that goes from fresh noise
to x0, and two Gaussian sightings of it are as good as one at a smaller time, where the map knows the posterior mean.
Re-noised draws go up to a noisier time and jump to data from there; weights make up for the difference.

r is the reward over the temperature throughout. References: Holderrieth et al. 2025, arXiv 2509.25170 (GLASS flows);
Holderrieth et al. 2026, arXiv 2602.05993 (Diamond maps, re-noised and weighted); Potaptchik et al. 2026, arXiv
2601.14430 (Meta Flow Maps: the value and its gradient by draws).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from steerfm.conditions.sight import sight
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, as_times
from steerfm.paths import Path
from steerfm.sampling import few_jumps
from steerfm.solvers import shares
from steerfm.steering.common import check_counts
from steerfm.times import time_grid
from steerfm.types import Condition, State, Values

Solver = Literal["heun", "euler"]
HALVINGS = 60  # of [0, 1] in which a time is sought


class Draws:
    """Draw x0 given x_t = x, a row for every row of x and of standard normal noise like it; t > 0.

    weighted: whether `log_weights`, (rows,) and up to a constant, differ between the draws of one x. maps: flow maps of
    its own, whose calls count too.
    """

    weighted: bool = False

    @property
    def maps(self) -> Sequence[FlowMap]:
        """Flow maps beside the one that is steered; none for most."""
        return ()

    def draw(self, flow_map: FlowMap, x: State, t: float, noise: State, condition: Condition | None) -> State:
        """Return x0, (rows, *dim)."""
        raise NotImplementedError(f"{type(self).__name__} needs a method draw(flow_map, x, t, noise, condition).")

    def log_weights(
        self, flow_map: FlowMap, x: State, t: float, noise: State, x0: State, condition: Condition | None
    ) -> Values:
        """Return the logarithms of the draws' weights, (rows,)."""
        return x.new_zeros(len(x))


@dataclass(frozen=True)
class Glass(Draws):
    """Draw by GLASS; see `glass`. One Euler step returns the posterior mean whatever the noise, and is refused."""

    steps: int = 8
    solver: Solver = "heun"

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        if self.solver not in get_args(Solver):
            raise ConfigError(f"solver is 'heun' or 'euler', got '{self.solver}'.")
        if self.steps == 1:
            raise ConfigError("One inner step to data returns the posterior mean, not a draw: steps must be 2 or more.")

    def draw(self, flow_map: FlowMap, x: State, t: float, noise: State, condition: Condition | None) -> State:
        return glass(flow_map, x, t, noise, condition, steps=self.steps, solver=self.solver)


@dataclass(frozen=True)
class Renoised(Draws):
    """Draw by noise and a jump, see `renoised_draws`, with their weights or, biased, without.

    ratio: of the signal-to-noise ratios at t and where the jump starts, above 1. In many dimensions the weights
    are uneven, and few of the draws count.
    """

    ratio: float = 5.0
    weighted: bool = True

    def __post_init__(self) -> None:
        if not self.ratio > 1:
            raise ConfigError(f"ratio divides the signal-to-noise ratio and must be above 1, got {self.ratio}.")

    def draw(self, flow_map: FlowMap, x: State, t: float, noise: State, condition: Condition | None) -> State:
        return renoised_draws(flow_map, x, t, noise, condition, ratio=self.ratio)

    def log_weights(
        self, flow_map: FlowMap, x: State, t: float, noise: State, x0: State, condition: Condition | None
    ) -> Values:
        if not self.weighted:
            return x.new_zeros(len(x))
        return renoised_log_weights(flow_map, x, t, noise, x0, condition, ratio=self.ratio)


@dataclass(frozen=True)
class Sighted(Draws):
    """Draw in `jumps` jumps of a map that has learnt to, by FlowMapTraining(sighted=True): a Meta Flow Map.

    flow_map: of the same data, path and prompts as the one that is steered. As good as it was learnt, and the only
    draws that cost one call. Reference: Potaptchik et al. 2026, arXiv 2601.14430.
    """

    flow_map: FlowMap
    jumps: int = 1

    def __post_init__(self) -> None:
        check_counts(jumps=self.jumps)

    @property
    def maps(self) -> Sequence[FlowMap]:
        return (self.flow_map,)

    def draw(self, flow_map: FlowMap, x: State, t: float, noise: State, condition: Condition | None) -> State:
        told = sight(flow_map.path, x, as_times(t, x), condition)
        return few_jumps(self.flow_map, noise, self.jumps, told)


def glass(
    flow_map: FlowMap,
    x: State,
    t: float,
    noise: State,
    condition: Condition | None = None,
    *,
    s: float = 0.0,
    rho: float | None = None,
    steps: int = 8,
    solver: Solver = "heun",
) -> State:
    """Return draws of x_s given x_t = x, for s < t; at s = 0 of x0. One network call an inner step, two with Heun.

    x_s = alpha_s x0 + sigma_s (rho x1 + sqrt(1 - rho^2) noise'), x0 and x1 the pair behind x_t. rho: in (-1, 1); by
    default alpha_t sigma_s / (alpha_s sigma_t), the Markov transition; without effect at s = 0. Given x0 and x_t,
    x_s is gamma x_t + mean x0 + std noise'; the inner state y = A x0 + B noise goes from (A, B) = (0, 1) to
    (mean, std), both linear in q, by the ODE dy/dq = A' D + B' (y - A D) / B with D = E[x0 | x_t, y]. Exact as the
    steps grow if the velocity is; few make too narrow draws. Reference: Holderrieth et al. 2025, arXiv 2509.25170.
    """
    path = flow_map.path
    (alpha_t, sigma_t), (alpha_s, sigma_s) = shares(path, t), shares(path, s)
    if not 0 <= s < t:
        raise ConfigError(f"A transition goes to an earlier time, 0 <= s < t; got s = {s} and t = {t}.")
    rho = alpha_t * sigma_s / (alpha_s * sigma_t) if rho is None else rho
    if not -1 < rho < 1:
        raise ConfigError(f"rho is the correlation of old and new noise, in (-1, 1); got {rho}.")
    gamma = rho * sigma_s / sigma_t
    mean, std = alpha_s - gamma * alpha_t, sigma_s * math.sqrt(1 - rho**2)
    grid = time_grid(steps, 0.0, 1.0)
    B = [1 + q * (std - 1) for q in grid]
    seen = alpha_t / sigma_t  # of x0 in x_t; the inner state sees A / B
    inner = [q * mean / b if b > 0 else math.inf for q, b in zip(grid, B, strict=True)]
    both = torch.tensor([math.hypot(seen, each) for each in inner], dtype=torch.float64)
    together = time_of_ratio(path, both).tolist()

    def slope(y: State, i: int) -> State:
        r = together[i]
        # Where neither has seen anything of x0, at t = 1 and q = 0, x_t stands for both.
        own = seen / float(both[i]) if both[i] > 0 else 1.0
        other = inner[i] / float(both[i]) if both[i] > 0 else 0.0
        pooled = shares(path, r)[1] * (own / sigma_t * x + other / B[i] * y)
        D = flow_map.denoise(pooled, r, condition)
        return mean * D + (std - 1) / B[i] * (y - grid[i] * mean * D)

    y = noise
    for i, (q, q_next) in enumerate(itertools.pairwise(grid)):
        first = slope(y, i)
        y_next = y + (q_next - q) * first
        if solver == "heun" and B[i + 1] > 0:
            y_next = y + (q_next - q) / 2 * (first + slope(y_next, i + 1))
        y = y_next
    return gamma * x + y


def renoised_draws(
    flow_map: FlowMap,
    x: State,
    t: float,
    noise: State,
    condition: Condition | None = None,
    *,
    ratio: float = 5.0,
) -> State:
    """Return x0 = F(x_u, u, 0) of x_u, which is x_t = x noised up to u > t; one network call.

    ratio: of the signal-to-noise ratios (alpha / sigma)^2 at t and u. They follow p(x0 | x_t) if weighted by
    `renoised_log_weights`, not without. Reference: Holderrieth et al. 2026, arXiv 2602.05993.
    """
    u, centre, spread = _noised(flow_map.path, x, t, ratio)
    return flow_map.look_ahead(centre + spread * noise, u, condition)


def renoised_log_weights(
    flow_map: FlowMap,
    x: State,
    t: float,
    noise: State,
    x0: State,
    condition: Condition | None = None,
    *,
    ratio: float = 5.0,
) -> Values:
    """Return log p(x0 | x_t) over the log-density of a re-noised draw, up to a constant of x, (rows,); two calls.

    It is log p_u(x_u) - |x - alpha x0|^2 / (2 sigma^2) + |noise|^2 / 2: the determinants of the map cancel. log p_u
    is led from the mean c of x_u to x_u by the trapezoid (score(x_u) + score(c)) (x_u - c) / 2, both at u. Exact
    for an exact map of Gaussian data, whose score is linear; on other data the trapezoid is an approximation.
    """
    path = flow_map.path
    u, centre, spread = _noised(path, x, t, ratio)
    alpha, sigma = shares(path, t)
    x_u = centre + spread * noise
    slope = (flow_map.score(x_u, u, condition) + flow_map.score(centre, u, condition)) / 2
    exponent = slope * (x_u - centre) - (x - alpha * x0) ** 2 / (2 * sigma**2) + noise**2 / 2
    return exponent.flatten(1).sum(1)


def time_of_ratio(path: Path, ratio: Tensor) -> Tensor:
    """Return the times at which alpha / sigma, which falls with t, has these values; 0 for infinity, 1 for 0."""
    low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        noisier = path.alpha(middle) < ratio * path.sigma(middle)
        low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
    return high


def posterior_value(r: Tensor, log_weights: Tensor) -> Values:
    """Return V, the log of the mean of exp(r) over draws by their weights; (rows, M), (rows, M) -> (rows,).

    Low by O(1 / M): the logarithm is concave. Reference: Potaptchik et al. 2026, arXiv 2601.14430.
    """
    return (log_weights.log_softmax(1) + r).logsumexp(1)


def value_gradient(r: Tensor, gradients: Tensor) -> State:
    """Return grad V by reparametrisation: the draws' gradients of r, weighted by softmax(r).

    r: (rows, M) of unweighted draws x0(noise, x); gradients: of r with respect to x, (rows, M, *dim).
    """
    return _mean(r.softmax(1), gradients)


def gradient_free_drift(path: Path, t: Tensor, x0: State, r: Tensor, log_weights: Tensor) -> State:
    """Return eta grad V = d / sigma (E*[x0 | x_t] - E[x0 | x_t]) without a gradient of r; (rows, *dim).

    It follows from grad_x log p(x0 | x) = alpha (x0 - E[x0 | x]) / sigma^2. Linear path: (sum of w_i x0_i - mean of
    x0_i) / t, w = softmax(r). x0: (rows, M, *dim); r, log_weights: (rows, M); t: (rows,). One draw says nothing, as
    it is both means. Reference: Potaptchik et al. 2026, arXiv 2601.14430.
    """
    gap = _mean((r + log_weights).softmax(1) - log_weights.softmax(1), x0)
    return gap * (path.determinant(t) / path.sigma(t)).reshape(-1, *[1] * (gap.ndim - 1))


def _mean(weights: Tensor, rows: Tensor) -> Tensor:
    """Return the sums of (n, M, *dim) by weights (n, M)."""
    return torch.einsum("nm,nm...->n...", weights.to(rows), rows)


def _noised(path: Path, x: State, t: float, ratio: float) -> tuple[float, State, float]:
    """Return u > t, and mean and standard deviation of x_u given x_t = x."""
    alpha, sigma = shares(path, t)
    u = float(time_of_ratio(path, torch.tensor(alpha / sigma / math.sqrt(ratio), dtype=torch.float64)))
    sigma_u = shares(path, u)[1]
    # alpha_u / alpha_t is sigma_u / (sigma_t sqrt(ratio)), which is finite also where both alphas are 0.
    return u, sigma_u / (sigma * math.sqrt(ratio)) * x, sigma_u * math.sqrt(1 - 1 / ratio)
