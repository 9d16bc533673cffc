"""A small U-Net for pictures: group norm, adaptive scale and shift, attention to itself and to a text."""

from __future__ import annotations

import itertools
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


class _Looking(nn.Module):
    """Attention of the positions of a feature map: to each other, or to the tokens of a text."""

    def __init__(self, channels: int, heads: int, groups: int, tokens: int | None = None) -> None:
        super().__init__()
        self.norm = _norm(groups, channels)
        self.attention = Attention(channels, heads, tokens)
        start_at_zero(self.attention.leave)

    def forward(self, h: Tensor, text: tuple[Tensor, Tensor] | None = None) -> Tensor:
        positions = self.norm(h).flatten(2).transpose(1, 2)
        found = self.attention(positions, *(text or ()))
        return h + found.transpose(1, 2).unflatten(2, h.shape[2:])


class _Level(nn.Module):
    """The residual blocks of one resolution, and a look at the text after them where there is one."""

    def __init__(self, sizes: Sequence[int], width: int, groups: int, heads: int, tokens: int | None) -> None:
        super().__init__()
        pairs = itertools.pairwise(sizes)
        self.blocks = nn.ModuleList(_Block(inside, outside, width, groups) for inside, outside in pairs)
        self.look = None if tokens is None else _Looking(sizes[-1], heads, groups, tokens)

    def forward(self, h: Tensor, embedding: Tensor, text: tuple[Tensor, Tensor] | None) -> Tensor:
        for block in self.blocks:
            h = block(h, embedding)
        return h if self.look is None else self.look(h, text)


@remembered
class UNet(Told):
    """Predict u(x, s, t, condition) for pictures (C, H, W).

    channels: features at each level, the resolution halves from one to the next. blocks: residual blocks a
    level. attention_heads: heads of self-attention at the lowest level; 0 is none. num_classes: as in MLP.
    patch: pixels a side that become channels before the first level, and pixels again after the last.
    text: reads the text of a condition (WordEncoder, TextEmbeddings); its tokens are looked at on the `text_levels`
    lowest levels, with `text_heads` heads, and its first token joins the times. picture_channels: channels of a
    picture in condition["picture"], (B, picture_channels + 1, H, W), the last of which says where there is one; it
    is laid beside the state. guidance_input: as in MLP. The output layer starts at zero. Raises ConfigError where the
    picture cannot be halved that often.
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
        *,
        patch: int = 1,
        text: nn.Module | None = None,
        text_levels: int = 2,
        text_heads: int = 4,
        picture_channels: int = 0,
        guidance_input: bool = False,
    ) -> None:
        width = 4 * channels[0]
        super().__init__(data_shape, width, num_classes, frequencies, max_rate, text, picture_channels, guidance_input)
        _check_shape(self.data_shape, len(channels), patch)
        check_depth(blocks=blocks)
        if attention_heads and channels[-1] % attention_heads:
            raise ConfigError(
                f"attention_heads must divide the last of channels, {channels[-1]}: got {attention_heads}."
            )
        pixels = self.data_shape[0] * patch**2
        self.fold, self.unfold = nn.PixelUnshuffle(patch), nn.PixelShuffle(patch)
        self.enter = nn.Conv2d(self.channels_in * patch**2, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        def level(i: int, inside: int) -> _Level:
            looks = self.tokens if i >= len(channels) - text_levels else None
            return _Level([inside, *[channels[i]] * blocks], width, groups, text_heads, looks)

        inside = channels[0]
        for i, outside in enumerate(channels):
            self.down.append(level(i, inside))
            inside = outside
        self.attention = _Looking(inside, attention_heads, groups) if attention_heads else nn.Identity()
        self.middle = _Block(inside, inside, width, groups)
        for i, outside in reversed(list(enumerate(channels))):
            self.up.append(level(i, inside + outside))
            inside = outside
        self.norm = _norm(groups, inside)
        self.leave = nn.Conv2d(inside, pixels, 3, padding=1)
        start_at_zero(self.leave)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        text = self.read(x, condition)
        embedding = self.told(s, t, condition, text)
        h = self.fold(self.beside(x, condition)).contiguous(memory_format=torch.channels_last)  # faster on CPUs
        h = self.enter(h)
        skips = []
        for i, level in enumerate(self.down):
            if i:
                h = functional.avg_pool2d(h, 2)
            h = level(h, embedding, text)
            skips.append(h)
        h = self.middle(self.attention(h), embedding)
        for i, level in enumerate(self.up):
            if i:
                h = functional.interpolate(h, scale_factor=2.0, mode="nearest")
            h = level(torch.cat([h, skips.pop()], 1), embedding, text)
        return self.unfold(self.leave(functional.silu(self.norm(h))))


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    """Return a group norm of as many of `groups` groups as divide the channels."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def _check_shape(data_shape: tuple[int, ...], levels: int, patch: int) -> None:
    divisor = patch * 2 ** (levels - 1)
    if len(data_shape) != 3 or data_shape[1] % divisor or data_shape[2] % divisor:
        raise ConfigError(
            f"A U-Net with {levels} levels and patch {patch} needs pictures (C, H, W) with H and W divisible by "
            f"{divisor}, got {data_shape}: use fewer levels or pad the pictures."
        )
