"""What becomes of a loss before it is averaged: weights by sample and by time, robust forms, learnt uncertainty.

A weighting is called as weighting(losses, s, t) -> (B,) and returns what is minimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerfm.errors import ConfigError
from steerfm.types import Times, Values


def mean_square(x: Tensor) -> Values:
    """Return the mean square over all but the first dimension, (B,)."""
    return x.flatten(1).square().mean(1)


@dataclass(frozen=True)
class Uniform:
    """Weigh all samples alike."""

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return loss


@dataclass(frozen=True)
class Adaptive:
    """Weigh by 1 / (loss + offset)^power, without gradient: large errors pull less.

    Reference: Geng et al. 2025, arXiv 2505.13447 (MeanFlow), section 4.3.
    """

    power: float = 1.0
    offset: float = 1e-3

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return (loss.detach() + self.offset) ** -self.power * loss


@dataclass(frozen=True)
class PseudoHuber:
    """Take sqrt(loss + c^2) - c: the square of a small error, the size of a large one.

    Its gradient is that of Adaptive(power=0.5, offset=c^2), but for a factor of 2.
    Reference: Song and Dhariwal 2023, arXiv 2310.14189, section 3.3 (iCT; there c grows with the square root of the
    dimension and the loss is a sum, here both are means).
    """

    c: float = 0.03

    def __post_init__(self) -> None:
        _check_scale(self.c)

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return (loss + self.c**2).sqrt() - self.c


@dataclass(frozen=True)
class Cauchy:
    """Take c^2 log(1 + loss / c^2): the square of a small error; of a large one little more than of a middling one.

    Its gradient is that of Adaptive(power=1, offset=c^2), times c^2: the negative log-likelihood of a Cauchy error.
    """

    c: float = 0.03

    def __post_init__(self) -> None:
        _check_scale(self.c)

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return self.c**2 * torch.log1p(loss / self.c**2)


@dataclass(frozen=True)
class SourceTime:
    """Weigh by s^power, which lets high noise count more.

    For a network that predicts the denoised picture D, u = (x - D) / s: power 2 gives the plain squared error of D,
    power 0 that of the velocity, which small s dominate.
    """

    power: float = 1.0

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return s**self.power * loss


class Learnt(nn.Module):
    """Take exp(-w) loss + w with w(s, t) learnt, so that all times count alike.

    At its optimum w is the log of the mean loss at these times. It is a linear function of cosines and sines of both
    times and starts at 0; it is trained beside the map, and no part of the map that is saved.
    Reference: Karras et al. 2023, arXiv 2312.02696, eq. (21).
    """

    def __init__(self, frequencies: int = 8) -> None:
        super().__init__()
        self.rates: Tensor
        self.register_buffer("rates", torch.pi * torch.arange(frequencies), persistent=False)
        self.leave = nn.Linear(4 * frequencies, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, loss: Values, s: Times, t: Times) -> Values:
        """Return the weighted losses; shape (B,)."""
        angles = (torch.stack([s, t], 1)[:, :, None] * self.rates).flatten(1)
        w = self.leave(torch.cat([angles.cos(), angles.sin()], 1))[:, 0]
        return (-w).exp() * loss + w


def _check_scale(c: float) -> None:
    if not c > 0:
        raise ConfigError(f"c is the error from which a robust loss bends, and above 0: got {c}.")
