"""Per-sample weights of a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.types import Times, Values


def mean_square(x: Tensor) -> Values:
    """Return the mean square over all but the first dimension, (B,)."""
    return x.flatten(1).square().mean(1)


@dataclass(frozen=True)
class Uniform:
    """Weigh all samples alike."""

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return torch.ones_like(loss)


@dataclass(frozen=True)
class Adaptive:
    """Weigh by 1 / (loss + offset)^power, without gradient: large errors pull less.

    Reference: Geng et al. 2025, arXiv 2505.13447 (MeanFlow), section 4.3; power 0.5 is a pseudo-Huber loss.
    """

    power: float = 1.0
    offset: float = 1e-3

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return (loss.detach() + self.offset) ** -self.power


@dataclass(frozen=True)
class SourceTime:
    """Weigh by s^power, which lets high noise count more.

    For a network that predicts the denoised picture D, u = (x - D) / s: power 2 gives the plain squared error of D,
    power 0 that of the velocity, which small s dominate.
    """

    power: float = 1.0

    def __call__(self, loss: Values, s: Times, t: Times) -> Values:
        return s**self.power
