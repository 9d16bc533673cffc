"""Mixtures, paths and posterior draws for the tests of the core, worked out apart from steerfm.analytic."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from steerfm.analytic import GaussianMixture, QuadraticReward, analytic_flow_map
from steerfm.flow_map import FlowMap
from steerfm.paths import Linear, Path, Trigonometric, VariancePreserving

PATHS = (Linear(), Trigonometric(), VariancePreserving())
NAMES = [type(path).__name__ for path in PATHS]


def numbers(seed: int, *shape: int) -> Tensor:
    """Return normal float64 numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(seed: int, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return n uniform float64 numbers between low and high."""
    return low + (high - low) * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian() -> GaussianMixture:
    """Return N(m, 0.36 I) in two dimensions."""
    return GaussianMixture([[0.8, -0.5]], [0.36])


def mixture() -> GaussianMixture:
    """Return three components with full, different covariances and weights in two dimensions."""
    return GaussianMixture(
        [[-1.0, 0.5], [1.0, -0.3], [0.4, 1.6]],
        torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.4]], [[0.3, 0.0], [0.0, 0.6]]]),
        [0.3, 0.5, 0.2],
    )


def line() -> GaussianMixture:
    """Return two components in one dimension."""
    return GaussianMixture([[-1.2], [0.9]], [0.25, 0.5], [0.4, 0.6])


def exact(data: GaussianMixture, path: Path) -> FlowMap:
    """Return the flow map of `data`, good to 1e-10 with its derivatives; how fast the path moves sets the steps."""
    steps = 8 if len(data.means) == 1 else 24 if isinstance(path, VariancePreserving) else 14
    return analytic_flow_map(data, path, steps=steps, order=6)


def rewards() -> dict[str, QuadraticReward]:
    """Return one reward of each kind in two dimensions."""
    return {
        "linear": QuadraticReward.linear([0.7, -1.1]),
        "distance": QuadraticReward.distance([0.5, 0.3], 1.7),
        "rank one": QuadraticReward.rank_one([1.2, -0.8], -0.7, 0.6),
    }


def column(t: Tensor) -> Tensor:
    """Return (B,) as (B, 1)."""
    return t[:, None]


def jvp(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Return the derivative of `function` along `tangents`, by torch.func alone."""
    _, derivative = torch.func.jvp(function, primals, tangents)  # type: ignore[misc]
    return derivative


class Draws(NamedTuple):
    """Hold a batch of pairs that meet in one point: x0 (B, d), x1 (B, d)."""

    x0: Tensor
    x1: Tensor


def posterior_draws(data: GaussianMixture, path: Path, x_s: Tensor, s: float, n: int, seed: int) -> Draws:
    """Return n draws of (x0, x1) given alpha x0 + sigma x1 = x_s, one point (d,), by Gaussian conditioning.

    A component by its posterior weight, x0 from that component's Gaussian posterior, x1 from the path.
    """
    time = torch.tensor(s, dtype=torch.float64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    generator = torch.Generator().manual_seed(seed)
    log_weights, means, factors = [], [], []
    for weight, mean, covariance in zip(data.weights, data.means, data.covariances, strict=True):
        seen = alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
        gain = alpha * covariance @ torch.linalg.inv(seen)
        log_weights.append(weight.log() + MultivariateNormal(alpha * mean, seen).log_prob(x_s))
        means.append(mean + gain @ (x_s - alpha * mean))
        factors.append(torch.linalg.cholesky(covariance - alpha * gain @ covariance))
    shares = torch.stack(log_weights).softmax(0)
    chosen = torch.multinomial(shares, n, replacement=True, generator=generator)
    z = torch.randn(n, len(x_s), generator=generator, dtype=torch.float64)
    x0 = torch.stack(means)[chosen] + torch.einsum("nij,nj->ni", torch.stack(factors)[chosen], z)
    return Draws(x0, (x_s - alpha * x0) / sigma)


def log_marginal(data: GaussianMixture, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """Return log p_t(x) for x (B, d) and t (B,), by torch.distributions."""
    alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None, None]
    covariances = alpha[..., None] ** 2 * data.covariances + sigma**2 * torch.eye(x.shape[1], dtype=x.dtype)
    parts = MultivariateNormal(alpha * data.means, covariances).log_prob(x[:, None])
    return (data.weights.log() + parts).logsumexp(1)


def within_standard_errors(draws: Tensor, expected: Tensor | float, errors: float = 4.0) -> bool:
    """Say whether the mean of `draws` (n, ...) lies within so many standard errors of what is expected, everywhere.

    Four standard errors are passed by chance once in 16 000 for one number; the seeds are fixed.
    """
    error = draws.std(0) / len(draws) ** 0.5
    return bool(((draws.mean(0) - expected).abs() <= errors * error + 1e-12).all())


def slope(error: Callable[[int], float], coarse: int) -> float:
    """Return the order of convergence: log2 of the error at `coarse` steps over that at twice as many."""
    return float(torch.tensor(error(coarse) / error(2 * coarse)).log2())
