"""A small U-Net for pictures: group norm, adaptive scale and shift, optional attention at the lowest level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.building import remembered
from steerfm.errors import ConfigError
from steerfm.networks.embeddings import ClassEmbedding, TimeEmbedding, conditioning, start_at_zero
from steerfm.types import Condition, State, Times


class _Block(nn.Module):
    """Two 3x3 convolutions; the conditioning scales and shifts between them."""

    def __init__(self, inside: int, outside: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(groups, inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = _norm(groups, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * outside)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        start_at_zero(self.conv2)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        inner = self.conv1(functional.silu(self.norm1(h)))
        inner = self.norm2(inner) * (1 + scale) + shift
        return self.skip(h) + self.conv2(functional.silu(inner))


class _Attention(nn.Module):
    """Self-attention over the positions of a feature map."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(groups, channels)
        self.enter = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)
        start_at_zero(self.leave)

    def forward(self, h: Tensor) -> Tensor:
        batch, channels, height, width = h.shape
        split = self.enter(self.norm(h)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = (part.transpose(-1, -2) for part in split.unbind(1))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return h + self.leave(mixed.reshape(batch, channels, height, width))


@remembered
class UNet(nn.Module):
    """Predict u(x, s, t, condition) for pictures (C, H, W).

    channels: features at each level, the resolution halves from one to the next. blocks: residual blocks a
    level. attention_heads: heads of self-attention at the lowest level; 0 is none. num_classes: as in MLP.
    The output layer starts at zero. Raises ConfigError where the picture cannot be halved that often.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        attention_heads: int = 0,
        num_classes: int = 0,
        groups: int = 8,
        frequencies: int = 16,
        max_rate: float = 32.0,
    ) -> None:
        super().__init__()
        self.data_shape = tuple(data_shape)
        _check_shape(self.data_shape, len(channels))
        if attention_heads and channels[-1] % attention_heads:
            raise ConfigError(
                f"attention_heads must divide the last of channels, {channels[-1]}: got {attention_heads}."
            )
        width = 4 * channels[0]
        self.time = TimeEmbedding(width, frequencies, max_rate)
        self.classes = ClassEmbedding(num_classes, width) if num_classes else None
        self.enter = nn.Conv2d(data_shape[0], channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inside = channels[0]
        for outside in channels:
            sizes = [inside] + [outside] * (blocks - 1)
            self.down.append(nn.ModuleList(_Block(size, outside, width, groups) for size in sizes))
            inside = outside
        self.attention = _Attention(inside, attention_heads, groups) if attention_heads else nn.Identity()
        self.middle = _Block(inside, inside, width, groups)
        for outside in reversed(channels):
            sizes = [inside + outside] + [outside] * (blocks - 1)
            self.up.append(nn.ModuleList(_Block(size, outside, width, groups) for size in sizes))
            inside = outside
        self.norm = _norm(groups, inside)
        self.leave = nn.Conv2d(inside, data_shape[0], 3, padding=1)
        start_at_zero(self.leave)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        embedding = functional.silu(conditioning(self.time, self.classes, s, t, condition))
        h = self.enter(x)
        skips = []
        for level, group in enumerate(self.down):
            if level:
                h = functional.avg_pool2d(h, 2)
            h = _through(group, h, embedding)
            skips.append(h)
        h = self.middle(self.attention(h), embedding)
        for level, group in enumerate(self.up):
            if level:
                h = functional.interpolate(h, scale_factor=2.0, mode="nearest")
            h = _through(group, torch.cat([h, skips.pop()], 1), embedding)
        return self.leave(functional.silu(self.norm(h)))


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    """Return a group norm of as many of `groups` groups as divide the channels."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def _through(group: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    for block in group.children():
        h = block(h, embedding)
    return h


def _check_shape(data_shape: tuple[int, ...], levels: int) -> None:
    divisor = 2 ** (levels - 1)
    if len(data_shape) != 3 or data_shape[1] % divisor or data_shape[2] % divisor:
        raise ConfigError(
            f"A U-Net with {levels} levels needs pictures (C, H, W) with H and W divisible by {divisor}, "
            f"got {data_shape}: use fewer levels or pad the pictures."
        )
