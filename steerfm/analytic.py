"""Flow maps known exactly: Gaussian mixtures, their tilts and their values. The oracle of the tests.

Everything is worked in the eigenbasis of each component's covariance C_k = Q_k diag(l_k) Q_k^T, where
x_t | k ~ N(alpha mu_k, alpha^2 C_k + sigma^2 I) is diagonal with variances alpha^2 l_k + sigma^2.

Rewards are concave quadratics, r(x) = -x^T A x / 2 + b^T x + c. Linear, squared-distance and rank-one rewards
are special cases, and one Gaussian integral gives the tilt and the value of them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.paths import Linear, Path
from steerfm.types import Condition, State, Times, Values, unsqueeze_like


@dataclass(frozen=True)
class QuadraticReward:
    """r(x) = -x^T A x / 2 + b^T x + c on points (B, d), with A (d, d) positive semi-definite."""

    A: Tensor
    b: Tensor
    c: Tensor

    @staticmethod
    def linear(a: Sequence[float] | Tensor) -> QuadraticReward:
        """Return r(x) = a . x."""
        a = torch.as_tensor(a, dtype=torch.float64)
        return QuadraticReward(torch.zeros(len(a), len(a), dtype=a.dtype), a, torch.zeros((), dtype=a.dtype))

    @staticmethod
    def distance(y: Sequence[float] | Tensor, strength: float) -> QuadraticReward:
        """Return r(x) = -strength |x - y|^2 / 2."""
        y = torch.as_tensor(y, dtype=torch.float64)
        return QuadraticReward(strength * torch.eye(len(y), dtype=y.dtype), strength * y, -strength * y.dot(y) / 2)

    @staticmethod
    def rank_one(a: Sequence[float] | Tensor, y: float, sigma: float) -> QuadraticReward:
        """Return r(x) = -(y - a . x)^2 / (2 sigma^2), a measurement of one direction."""
        a = torch.as_tensor(a, dtype=torch.float64)
        return QuadraticReward(
            a.outer(a) / sigma**2, y * a / sigma**2, torch.tensor(-(y**2) / (2 * sigma**2), dtype=a.dtype)
        )

    def __truediv__(self, temperature: float) -> QuadraticReward:
        return QuadraticReward(self.A / temperature, self.b / temperature, self.c / temperature)

    def __call__(self, x: Tensor, prompts: Sequence[str] | None = None) -> Values:
        A, b, c = (part.to(x) for part in (self.A, self.b, self.c))
        return -0.5 * torch.einsum("bi,ij,bj->b", x, A, x) + x @ b + c


class GaussianMixture(nn.Module):
    """A mixture of Gaussians with full covariances: sampling, density, posteriors on a path, tilts and values.

    means: (K, d). covariances: (K, d, d), or one number a component for multiples of the identity.
    weights: (K,), positive, normalised here; equal by default. Buffers are float64; `.to(dtype)` casts.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        covariances: Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        count, d = means.shape
        if covariances.ndim == 1:
            covariances = covariances[:, None, None] * torch.eye(d, dtype=torch.float64)
        if covariances.shape != (count, d, d):
            raise ConfigError(f"covariances need the shape {(count, d, d)} or ({count},), got {covariances.shape}.")
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
        if weights.shape != (count,) or (weights < 0).any() or not weights.sum() > 0:
            raise ConfigError(f"weights need {count} numbers of at least 0, not all 0, got {weights.tolist()}.")
        values, vectors = torch.linalg.eigh(covariances)
        if values.min() < 0:
            raise ConfigError(f"covariances must be positive definite, got one with eigenvalue {float(values.min())}.")
        self.data_shape = (d,)
        self.means: Tensor
        self.covariances: Tensor
        self.log_weights: Tensor
        self.values: Tensor  # eigenvalues l_k, (K, d)
        self.vectors: Tensor  # eigenvectors in columns, (K, d, d)
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)
        self.round = bool((covariances == values[:, :1, None] * torch.eye(d, dtype=torch.float64)).all())

    @property
    def weights(self) -> Tensor:
        """Return the weights of the components, (K,)."""
        return self.log_weights.exp()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n points, (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, *self.data_shape, generator=generator, dtype=torch.float64).to(self.means)
        scaled = self.values[k].sqrt() * z
        for each in range(len(self.means)):  # a matrix for every point would fill the memory in a hundred dimensions
            scaled[k == each] = scaled[k == each] @ self.vectors[each].T
        return self.means[k] + scaled

    def log_prob(self, x: State) -> Values:
        """Return log p(x), (B,)."""
        zeros = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        return self._log_joint(*self._centred(x, zeros, Linear())).logsumexp(1)

    def _centred(self, x: State, t: Times, path: Path) -> tuple[Tensor, Tensor]:
        """Return x - alpha mu_k in the eigenbases, and its variances; both (B, K, d)."""
        alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
        z = torch.einsum("kij,bki->bkj", self.vectors, x[:, None] - alpha * self.means)
        return z, alpha**2 * self.values + sigma**2

    def _log_joint(self, z: Tensor, variance: Tensor) -> Tensor:
        """Return log of w_k N(x; alpha mu_k, alpha^2 C_k + sigma^2 I), (B, K), from what `_centred` returns."""
        return self.log_weights - 0.5 * (z**2 / variance + variance.log() + math.log(2 * math.pi)).sum(2)

    def velocity(self, x: State, t: Times, path: Path) -> State:
        """Return v(x, t) = alpha' E[x0 | x_t] + sigma' E[x1 | x_t], (B, d).

        Given k the two means are mu_k + Q_k (alpha l_k / variance_k z_k) and Q_k (sigma / variance_k z_k).
        """
        if self.round:
            return self._round_velocity(x, t, path)
        z, variance = self._centred(x, t, path)
        share = self._log_joint(z, variance).softmax(1)
        alpha_dot = path.alpha_dot(t)[:, None]
        rate = (path.alpha(t)[:, None] * alpha_dot)[:, :, None] * self.values + path.half_variance_dot(t)[:, None, None]
        spread = torch.einsum("kij,bkj->bi", self.vectors, share[:, :, None] * rate / variance * z)
        return alpha_dot * (share @ self.means) + spread

    def _round_velocity(self, x: State, t: Times, path: Path) -> State:
        """Return the velocity where every covariance is a multiple of the identity, in a tenth of the time.

        Components lead, (K, B): a softmax over a few columns is slow.
        """
        x = x.to(torch.promote_types(x.dtype, self.means.dtype))
        alpha, alpha_dot, c2 = path.alpha(t), path.alpha_dot(t), self.values[:, :1]
        variance = alpha**2 * c2 + path.sigma(t) ** 2
        squares = x.square().sum(1) - 2 * alpha * (self.means @ x.T) + alpha**2 * self.means.square().sum(1)[:, None]
        joint = self.log_weights[:, None] - 0.5 * (squares / variance + x.shape[1] * variance.log())
        share = joint.softmax(0)
        rate = share * (alpha * alpha_dot * c2 + path.half_variance_dot(t)) / variance
        return ((alpha_dot * share - alpha * rate).T @ self.means) + rate.sum(0)[:, None] * x

    def tilt(self, reward: QuadraticReward) -> GaussianMixture:
        """Return the mixture p(x) exp(r(x)) / Z: precisions C^-1 + A, means moved, weights by their evidence."""
        A, b = reward.A.to(self.means), reward.b.to(self.means)
        precision = torch.linalg.inv(self.covariances) + A
        covariances = torch.linalg.inv(precision)
        pull = torch.einsum("kij,kj->ki", torch.linalg.inv(self.covariances), self.means) + b
        evidence = _log_expected_exp(reward, self.means, self.covariances)
        weights = (self.log_weights + evidence).softmax(0)
        return GaussianMixture(torch.einsum("kij,kj->ki", covariances, pull), covariances, weights)

    def value(self, x: State, t: Times, reward: QuadraticReward, path: Path | None = None) -> Values:
        """Return V_t(x) = log E[exp r(x0) | x_t = x], (B,); t > 0."""
        path = path or Linear()
        alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
        z, variance = self._centred(x, t, path)
        clean = self.means + torch.einsum("kij,bkj->bki", self.vectors, alpha * self.values / variance * z)
        spread = self.values * sigma**2 / variance
        covariance = torch.einsum("kij,bkj,klj->bkil", self.vectors, spread, self.vectors)
        share = self._log_joint(z, variance).log_softmax(1)
        return (share + _log_expected_exp(reward, clean, covariance)).logsumexp(1)


def _log_expected_exp(reward: QuadraticReward, m: Tensor, S: Tensor) -> Tensor:
    """Return log E exp r(x) for x ~ N(m, S), m (..., d), S (..., d, d).

    Completing the square with g = b - A m:  r(m) + g^T (I + S A)^-1 S g / 2 - log det(I + S A) / 2.
    """
    A, b, c = (part.to(m) for part in (reward.A, reward.b, reward.c))
    g = b - m @ A
    system = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device) + S @ A
    shifted = torch.linalg.solve(system, (S @ g[..., None]))[..., 0]
    mean_reward = -0.5 * torch.einsum("...i,ij,...j->...", m, A, m) + m @ b + c
    return mean_reward + 0.5 * (g * shifted).sum(-1) - 0.5 * torch.linalg.slogdet(system).logabsdet


class MixtureNetwork(nn.Module):
    """The exact u(x, s, t) of a mixture, as a network: integrates the exact velocity.

    u = integral over a in [0, 1] of v(x + (t - s) U(a), s + a (t - s)) with U' the integrand, so that nothing
    is divided by t - s. Solved by `steps` steps, in proportion fewer for jumps that are shorter than from noise to
    data, of the extrapolated midpoint rule of order 2 `order` (Hairer, Norsett, Wanner, "Solving ordinary differential
    equations I", section II.9).
    """

    def __init__(self, mixture: GaussianMixture, path: Path | None = None, steps: int = 8, order: int = 5) -> None:
        super().__init__()
        self.mixture = mixture
        self.path = path or Linear()
        self.steps = steps
        self.order = order
        self.data_shape = mixture.data_shape

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        if s is t:
            return self.mixture.velocity(x, t, self.path)
        interval = t - s

        def rate(U: Tensor, a: float) -> Tensor:
            return self.mixture.velocity(x + unsqueeze_like(interval, x) * U, s + a * interval, self.path)

        U, steps = torch.zeros_like(x), max(1, math.ceil(self.steps * float(interval.detach().abs().max())))
        for i in range(steps):
            U = U + _extrapolated_step(rate, U, i / steps, 1 / steps, self.order)
        return U


def _extrapolated_step(rate, U: Tensor, a: float, h: float, order: int) -> Tensor:
    """Return the increment over one step of size h from a: midpoint rules with 2, 4, ... substeps, extrapolated."""
    counts = [2 * (i + 1) for i in range(order)]
    first = rate(U, a)
    table: list[Tensor] = []
    for i, n in enumerate(counts):
        previous, current = torch.zeros_like(U), (h / n) * first
        for j in range(1, n):
            previous, current = current, previous + (2 * h / n) * rate(U + current, a + j * h / n)
        row = [current]
        for j in range(i):  # Aitken-Neville in (h / n)^2: the midpoint rule's error has even powers only
            factor = (counts[i] / counts[i - j - 1]) ** 2 - 1
            row.append(row[j] + (row[j] - table[j]) / factor)
        table = row
    return table[-1]


def analytic_flow_map(mixture: GaussianMixture, path: Path | None = None, steps: int = 8, order: int = 5) -> FlowMap:
    """Return the exact flow map of a mixture; every sampler and method takes it as it takes a trained one."""
    path = path or Linear()
    return FlowMap(MixtureNetwork(mixture, path, steps, order), path=path)
