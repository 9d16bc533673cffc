"""Paths from data to noise, x_t = alpha(t) x0 + sigma(t) x1, and what can be read off a velocity.

t = 0 is clean data x0, t = 1 is noise x1 ~ N(0, I). With v = alpha' E[x0|x_t] + sigma' E[x1|x_t], the pair
(x_t, v) is a linear image of (E[x0|x_t], E[x1|x_t]) with determinant

    d = alpha sigma' - alpha' sigma        (linear path: 1)

so both expectations, the score and every diffusion coefficient follow from v by 2x2 algebra. One function,
eta = sigma sigma' - sigma^2 alpha'/alpha = sigma d / alpha (linear: t / (1 - t)), does the rest.

Reference: Albergo, Boffi, Vanden-Eijnden 2023, arXiv 2303.08797 (stochastic interpolants).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.types import State, Times, unsqueeze_like


@dataclass(frozen=True)
class Path:
    """Hold one path from data to noise; subclasses give alpha, sigma and their derivatives."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the share of data at time t."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Return the share of noise at time t."""
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return d alpha / dt."""
        raise NotImplementedError

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return d sigma / dt."""
        raise NotImplementedError

    def half_variance_dot(self, t: Tensor) -> Tensor:
        """Return sigma sigma', half the rate of the noise's variance; finite also where sigma' is not."""
        return self.sigma(t) * self.sigma_dot(t)

    def determinant(self, t: Tensor) -> Tensor:
        """Return d = alpha sigma' - alpha' sigma, positive on (0, 1]."""
        return self.alpha(t) * self.sigma_dot(t) - self.alpha_dot(t) * self.sigma(t)

    def sigma_determinant(self, t: Tensor) -> Tensor:
        """Return sigma d = alpha sigma sigma' - alpha' sigma^2, finite on [0, 1]; linear path: t."""
        return self.alpha(t) * self.half_variance_dot(t) - self.alpha_dot(t) * self.sigma(t) ** 2

    def eta(self, t: Tensor) -> Tensor:
        """Return eta = sigma d / alpha, which joins velocity, score and value; infinite where alpha = 0."""
        return self.sigma_determinant(t) / self.alpha(t)

    def interpolate(self, x0: State, x1: State, t: Times) -> State:
        """Return x_t = alpha x0 + sigma x1; shape (B, *dim)."""
        return unsqueeze_like(self.alpha(t), x0) * x0 + unsqueeze_like(self.sigma(t), x0) * x1

    def tangent(self, x0: State, x1: State, t: Times) -> State:
        """Return w = alpha' x0 + sigma' x1, whose mean given x_t is the velocity; linear path: x1 - x0."""
        return unsqueeze_like(self.alpha_dot(t), x0) * x0 + unsqueeze_like(self.sigma_dot(t), x0) * x1

    def denoised(self, x: State, v: State, t: Times) -> State:
        """Return E[x0 | x_t] = (sigma' x - sigma v) / d; linear path: x - t v."""
        a, b = unsqueeze_like(self.sigma_dot(t), x), unsqueeze_like(self.sigma(t), x)
        return (a * x - b * v) / unsqueeze_like(self.determinant(t), x)

    def noise(self, x: State, v: State, t: Times) -> State:
        """Return E[x1 | x_t] = (alpha v - alpha' x) / d; linear path: x + (1 - t) v."""
        a, b = unsqueeze_like(self.alpha(t), x), unsqueeze_like(self.alpha_dot(t), x)
        return (a * v - b * x) / unsqueeze_like(self.determinant(t), x)

    def score(self, x: State, v: State, t: Times) -> State:
        """Return the score, -E[x1 | x_t] / sigma; infinite at t = 0."""
        return -self.noise(x, v, t) / unsqueeze_like(self.sigma(t), x)

    def velocity(self, x: State, denoised: State, t: Times) -> State:
        """Return v from E[x0 | x_t]: (sigma' x - d E[x0 | x_t]) / sigma; infinite at t = 0."""
        a, d = unsqueeze_like(self.sigma_dot(t), x), unsqueeze_like(self.determinant(t), x)
        return (a * x - d * denoised) / unsqueeze_like(self.sigma(t), x)

    def gentle_noise(self, t: Times) -> Times:
        """Return g^2 = 2 sigma d, finite everywhere; linear path: 2 t. The default of trajectory tilting."""
        return 2 * self.sigma_determinant(t)

    def memoryless_noise(self, t: Times, offset: float) -> Times:
        """Return g^2 = 2 eta with alpha raised by what it falls in the last step; linear path: 2 t / (1 - t + h).

        `offset` is h, the step of the discretisation: exact eta is infinite at t = 1. Start and end of the
        trajectory are then independent as h -> 0 (Domingo-Enrich et al. 2024, arXiv 2409.08861, section 4).
        """
        fall = self.alpha(torch.full_like(t, 1 - offset)) - self.alpha(torch.ones_like(t))
        return 2 * self.sigma_determinant(t) / (self.alpha(t) + fall)


@dataclass(frozen=True)
class Linear(Path):
    """x_t = (1 - t) x0 + t x1: flow matching's and rectified flow's path."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Straight(Path):
    """alpha = 1 - (1 - end_alpha) t, sigma = end_sigma t: a straight path on which a little data is left at t = 1.

    end_alpha in [0, 1), end_sigma positive. Any diffusion whose last sigma / alpha is finite has this path once its
    states are scaled, with the determinant end_sigma at all times. Noise at t = 1 is taken as N(0, I), as everyone
    does.
    """

    end_alpha: float = 0.0
    end_sigma: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.end_alpha) * t

    def sigma(self, t: Tensor) -> Tensor:
        return self.end_sigma * t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.end_alpha - 1)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.end_sigma)


@dataclass(frozen=True)
class Trigonometric(Path):
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) x1: TrigFlow's path with t scaled to [0, 1]."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -(math.pi / 2) * torch.sin(t * (math.pi / 2))

    def sigma_dot(self, t: Tensor) -> Tensor:
        return (math.pi / 2) * torch.cos(t * (math.pi / 2))


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha = exp(-(beta_max - beta_min) t^2 / 4 - beta_min t / 2), sigma = sqrt(1 - alpha^2).

    The variance-preserving diffusion of Song et al. 2021, arXiv 2011.13456, appendix C. alpha(1) is 0.0066
    and not 0: noise at t = 1 is taken as N(0, I), as everyone does. sigma' is infinite at t = 0, and bounded
    here by its value at t = 1e-7, where sigma = 1e-4, so that nothing at t = 0 is infinite times zero.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t)

    def sigma(self, t: Tensor) -> Tensor:
        exponent = -0.5 * (self.beta_max - self.beta_min) * t**2 - self.beta_min * t
        return torch.sqrt(-torch.expm1(exponent))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.half_variance_dot(t) / self.sigma(t).clamp_min(1e-4)

    def half_variance_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t)
