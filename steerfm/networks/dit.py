"""A diffusion transformer: patches as tokens, adaptive norm with gates, and a text to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.building import remembered
from steerfm.errors import ConfigError
from steerfm.networks.attention import Attention
from steerfm.networks.embeddings import check_depth, start_at_zero
from steerfm.networks.told import Told
from steerfm.types import Condition, State, Times


class _Block(nn.Module):
    """Attention and two dense layers, each scaled, shifted and gated by the conditioning; a look at the text between.

    A block starts as the identity (adaLN-zero).
    """

    def __init__(self, width: int, heads: int, expansion: float, tokens: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.text_norm = None if tokens is None else nn.LayerNorm(width)
        self.look = None if tokens is None else Attention(width, heads, tokens)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        hidden = round(width * expansion)
        self.dense = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)
        start_at_zero(self.modulation)
        if self.look is not None:
            start_at_zero(self.look.leave)

    def forward(self, h: Tensor, embedding: Tensor, text: tuple[Tensor, Tensor] | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None, :].chunk(6, 2)
        h = h + gate1 * self.attention(self.norm1(h) * (1 + scale1) + shift1)
        if self.look is not None and self.text_norm is not None and text is not None:
            h = h + self.look(self.text_norm(h), *text)
        return h + gate2 * self.dense(self.norm2(h) * (1 + scale2) + shift2)


@remembered
class DiT(Told):
    """Predict u(x, s, t, condition) for pictures (C, H, W) with a transformer on patches.

    patch: pixels a side of a token. width, depth, heads: features, blocks and attention heads; expansion: hidden
    features of the dense layers, times width. decoupled: so many last blocks (and the output) are told the target
    time t alone, and all before them the source time s alone; 0 tells every block s, t and t - s. On the diagonal a
    decoupled network is one of a single time, so that a velocity network becomes a flow map without a new weight.
    num_classes, text, picture_channels, guidance_input: as in UNet; every block looks at the text. Raises ConfigError
    for pictures that do not divide into patches.

    Reference: Peebles and Xie 2023, arXiv 2212.09748 (adaLN-zero); Chen et al. 2023, arXiv 2310.00426 (the look at the
    text); Lee et al. 2025, arXiv 2510.24474 (decoupled times).
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        patch: int = 4,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        expansion: float = 4.0,
        num_classes: int = 0,
        frequencies: int = 16,
        max_rate: float = 32.0,
        *,
        decoupled: int = 0,
        text: nn.Module | None = None,
        picture_channels: int = 0,
        guidance_input: bool = False,
    ) -> None:
        super().__init__(data_shape, width, num_classes, frequencies, max_rate, text, picture_channels, guidance_input)
        _check(self.data_shape, patch, width, depth, decoupled)
        self.decoupled = decoupled
        channels, height, across = self.data_shape
        self.enter = nn.Conv2d(self.channels_in, width, patch, stride=patch)
        self.places: Tensor
        self.register_buffer("places", _places(height // patch, across // patch, width), persistent=False)
        self.blocks = nn.ModuleList(_Block(width, heads, expansion, self.tokens) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch**2)
        self.unfold = nn.PixelShuffle(patch)
        start_at_zero(self.modulation)
        start_at_zero(self.leave)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        text = self.read(x, condition)
        if self.decoupled:
            early, late = (self.told(time, time, condition, text) for time in (s, t))
        else:
            early = late = self.told(s, t, condition, text)
        patches = self.enter(self.beside(x, condition))
        h = patches.flatten(2).transpose(1, 2) + self.places
        for i, block in enumerate(self.blocks):
            h = block(h, early if i < len(self.blocks) - self.decoupled else late, text)
        shift, scale = self.modulation(late)[:, None, :].chunk(2, 2)
        pixels = self.leave(self.norm(h) * (1 + scale) + shift)
        return self.unfold(pixels.transpose(1, 2).unflatten(2, patches.shape[2:]))


def _places(rows: int, columns: int, width: int) -> Tensor:
    """Return fixed sines and cosines of each token's row and column, (rows * columns, width)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 4) / (width // 4))
    angles = [torch.outer(torch.arange(n).float(), rates) for n in (rows, columns)]
    down, across = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)
    grid = torch.cat([down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)], 2)
    return functional.pad(grid.flatten(0, 1), (0, width - 4 * (width // 4)))


def _check(data_shape: tuple[int, ...], patch: int, width: int, depth: int, decoupled: int) -> None:
    if len(data_shape) != 3 or data_shape[1] % patch or data_shape[2] % patch:
        raise ConfigError(
            f"A DiT of patch {patch} needs pictures (C, H, W) with H and W divisible by it, got {data_shape}: use "
            "another patch or pad the pictures."
        )
    check_depth(depth=depth)
    if width < 4 or depth < 1 or not 0 <= decoupled < depth:
        raise ConfigError(
            "A DiT needs a width of at least 4, one block or more, and fewer decoupled blocks than blocks: got "
            f"width={width}, depth={depth}, decoupled={decoupled}."
        )
