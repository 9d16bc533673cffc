"""Two-dimensional points, drawn anew at every step: mixtures, checkerboard, moons, ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from steerfm.data.batches import StepDataModule, own_rows
from steerfm.errors import ConfigError, nearest
from steerfm.seeds import torch_generator


def checkerboard(n: int, generator: Generator | None = None) -> Tensor:
    """Return (n, 2) points uniform on the dark squares of a 4x4 board on [-1, 1]^2."""
    column = torch.randint(0, 4, (n,), generator=generator)
    row = 2 * torch.randint(0, 2, (n,), generator=generator) + column % 2
    corner = torch.stack([column, row], 1).float()
    return (corner + torch.rand(n, 2, generator=generator)) / 2 - 1


def moons(n: int, generator: Generator | None = None) -> Tensor:
    """Return (n, 2) points of two interleaved half circles with noise 0.05, in about [-1, 1]^2."""
    angle = math.pi * torch.rand(n, generator=generator)
    lower = (torch.rand(n, generator=generator) < 0.5).float()
    x = torch.cos(angle) * (1 - 2 * lower) + lower
    y = torch.sin(angle) * (1 - 2 * lower) + 0.5 * lower
    points = torch.stack([x - 0.5, y - 0.25], 1) / 1.5
    return points + 0.05 * torch.randn(n, 2, generator=generator)


def ring(n: int, generator: Generator | None = None) -> Tensor:
    """Return (n, 2) points on a circle of radius 0.8 with radial noise 0.05."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    radius = 0.8 + 0.05 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def mixture(n: int, generator: Generator | None = None) -> Tensor:
    """Return (n, 2) points of three Gaussians on a diagonal: means (-3,-3), (0,0), (3,3), covariance I / 2."""
    centre = 3.0 * (torch.randint(0, 3, (n, 1), generator=generator) - 1)
    return centre + math.sqrt(0.5) * torch.randn(n, 2, generator=generator)


KINDS: dict[str, Callable[[int, Generator | None], Tensor]] = {
    "checkerboard": checkerboard,
    "moons": moons,
    "ring": ring,
    "mixture": mixture,
}


class Points(StepDataModule):
    """Batches {"x0": (B, 2), "prompt": ""} of fresh points.

    kind: "checkerboard", "moons", "ring" or "mixture". batch_size: points a step, over all processes.
    """

    def __init__(
        self, kind: str = "checkerboard", batch_size: int = 1024, validation_size: int = 2048, seed: int = 0
    ) -> None:
        super().__init__()
        _check_kind(kind)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        self.kind = kind
        self.batch_size = batch_size
        self.validation_size = validation_size
        self.seed = seed

    def batch(self, step: int) -> dict[str, Any]:
        generator = torch_generator(self.seed, "data", step)
        x0 = KINDS[self.kind](self.batch_size, generator)[own_rows(self.batch_size)]
        return {"x0": x0, "prompt": [""] * len(x0)}

    def validation_batch(self) -> dict[str, Any] | None:
        if self.validation_size == 0:
            return None
        x0 = KINDS[self.kind](self.validation_size, torch_generator(self.seed, "validation"))
        return {"x0": x0, "prompt": [""] * self.validation_size}


def point_cloud(kind: str, n: int = 4096, seed: int = 1) -> Tensor:
    """Return (n, 2) points of a kind, as what samples are compared with."""
    _check_kind(kind)
    return KINDS[kind](n, torch.Generator().manual_seed(seed))


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        near = nearest(kind, KINDS) or "."
        raise ConfigError(f"There are no points of the kind '{kind}'{near} Kinds: {', '.join(KINDS)}.")
