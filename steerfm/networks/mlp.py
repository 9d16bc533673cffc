"""Two MLPs: residual with adaptive norm, for points and tiny pictures; and plain, for points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.building import remembered
from steerfm.networks.embeddings import (
    ClassEmbedding,
    GuidanceEmbedding,
    TimeEmbedding,
    check_depth,
    conditioning,
    start_at_zero,
)
from steerfm.types import Condition, State, Times


class _Block(nn.Module):
    """h + gate * MLP(norm(h) (1 + scale) + shift), with shift, scale and gate read off the conditioning."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        start_at_zero(self.modulation)  # adaLN-zero: each block starts as the identity

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(embedding).chunk(3, 1)
        return h + gate * self.down(functional.silu(self.up(self.norm(h) * (1 + scale) + shift)))


@remembered
class MLP(nn.Module):
    """Predict u(x, s, t, condition) with residual blocks on the flattened state.

    data_shape: shape of one sample, for example (2,) or (1, 8, 8). width: features; depth: blocks;
    expansion: hidden units a feature. num_classes: classes the condition's "label" may name; 0 is none.
    guidance_input: reads the guidance scale in the condition's "guidance", so that a guided map is one call. The
    output layer starts at zero. Reference: Peebles and Xie 2023, arXiv 2212.09748 (adaptive norm).
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        width: int = 256,
        depth: int = 4,
        expansion: float = 2.0,
        num_classes: int = 0,
        frequencies: int = 16,
        max_rate: float = 32.0,
        *,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        check_depth(depth=depth)
        self.data_shape = tuple(data_shape)
        self.guidance_input = guidance_input
        self.time = TimeEmbedding(width, frequencies, max_rate)
        self.classes = ClassEmbedding(num_classes, width) if num_classes else None
        self.guidance = GuidanceEmbedding(width) if guidance_input else None
        self.enter = nn.Linear(math.prod(data_shape), width)
        self.blocks = nn.ModuleList(_Block(width, round(width * expansion)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, math.prod(data_shape))
        start_at_zero(self.leave)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        told = conditioning(self.time, self.classes, s, t, condition, guidance=self.guidance)
        embedding = functional.silu(told)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.leave(self.norm(h)).reshape(x.shape)


@remembered
class PlainMLP(nn.Module):
    """Predict u(x, s, t) with `depth` hidden layers of `width`, which see x, s and t side by side.

    data_shape: shape of one sample, for example (2,). Reads no condition. The output layer starts at zero. On
    points it learns what `MLP` does for a tenth of the time a step.
    """

    def __init__(self, data_shape: Sequence[int], width: int = 256, depth: int = 4) -> None:
        super().__init__()
        check_depth(depth=depth)
        self.data_shape = tuple(data_shape)
        size = math.prod(data_shape)
        widths = [size + 2, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.leave = nn.Linear(width, size)
        start_at_zero(self.leave)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        h = torch.cat([x.flatten(1), s[:, None], t[:, None]], 1)
        for layer in self.hidden:
            h = functional.gelu(layer(h))
        return self.leave(h).reshape(x.shape)


def randomise(network: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Draw all parameters anew, so that layers which start at zero take part in a test or a benchmark."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(scale * noise + (1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0))
