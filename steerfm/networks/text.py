"""How a network reads a text: words that it embeds itself, the embeddings of a frozen encoder, or parsed attributes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.building import remembered
from steerfm.errors import ConfigError
from steerfm.networks.attention import Attention
from steerfm.networks.embeddings import check_depth
from steerfm.types import Condition


class TextEncoder(Protocol):
    """Read the text of a condition; `width` is that of a token."""

    width: int

    def __call__(self, condition: Condition | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L, width) and which of them count, (B, L) bool, the first one always."""
        ...


def told(condition: Condition, name: str) -> Tensor:
    """Return a tensor of a condition. Raises ConfigError where the map's conditioner gives others."""
    if name not in condition.tensors:
        raise ConfigError(
            f"The network reads '{name}', and the condition has {list(condition.tensors)}: give the map the "
            "conditioner that goes with its network."
        )
    return condition[name]


class _Layer(nn.Module):
    """Self-attention and two dense layers, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.dense = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h), mask=mask)
        return h + self.dense(self.norm2(h))


@remembered
class WordEncoder(nn.Module):
    """Read condition["words"] (B, L) long, as CaptionWords numbers them, with a small transformer.

    vocabulary_size: words without padding and the unknown word. length: the most words. The first token stands
    for the whole caption, and alone for the null condition.
    """

    def __init__(
        self, vocabulary_size: int, length: int = 32, width: int = 96, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.width = width
        self.words = nn.Embedding(vocabulary_size + 2, width)
        self.places = nn.Parameter(0.5 * torch.randn(length + 1, width))
        check_depth(layers=layers)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, condition: Condition | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L + 1, width) and their mask."""
        if condition is None:
            words = torch.zeros((len(like), len(self.places) - 1), dtype=torch.long, device=like.device)
        else:
            words = told(condition, "words")
        whole = self.places[:1].expand(len(words), 1, -1)
        h = torch.cat([whole, self.words(words) + self.places[1 : words.shape[1] + 1]], 1)
        mask = functional.pad(words > 0, (1, 0), value=True)
        for layer in self.layers:
            h = layer(h, mask)
        return self.norm(h), mask


class _Whole(nn.Module):
    """Put a learnt token for the whole caption first, and let it and the others look at those that count."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if layers < 1:
            raise ConfigError(f"A text needs at least 1 layer, in which its first token sees the others: got {layers}.")
        self.first = nn.Parameter(0.5 * torch.randn(1, width))
        check_depth(layers=layers)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([self.first.expand(len(tokens), 1, -1).to(tokens), tokens], 1)
        mask = functional.pad(mask, (1, 0), value=True)
        for layer in self.layers:
            h = layer(h, mask)
        return self.norm(h), mask


@remembered
class TextEmbeddings(nn.Module):
    """Read condition["embedding"] (B, L, dimension) where condition["embedding_mask"] (B, L) is true.

    These are what FrozenText gives; dimension is that of its encoder, `FrozenText.dimension`. They are standardised,
    brought to `width`, and `layers` of self-attention tell the first token, which stands for the whole caption, and
    alone for the null condition. Raises ConfigError for embeddings of another dimension.
    """

    def __init__(self, dimension: int, width: int = 96, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.dimension, self.width = dimension, width
        self.enter = nn.Sequential(nn.LayerNorm(dimension), nn.Linear(dimension, width))
        self.whole = _Whole(width, layers, heads)

    def forward(self, condition: Condition | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L + 1, width) and their mask."""
        if condition is None:
            embedding = like.new_zeros(len(like), 0, self.dimension)
            mask = torch.zeros(len(like), 0, dtype=torch.bool, device=like.device)
        else:
            embedding, mask = told(condition, "embedding"), told(condition, "embedding_mask")
        if embedding.shape[-1] != self.dimension:
            raise ConfigError(
                f"The network reads text embeddings of dimension {self.dimension}, and the encoder gives "
                f"{embedding.shape[-1]}: write TextEmbeddings({embedding.shape[-1]}), or take the other encoder."
            )
        return self.whole(self.enter(embedding.to(self.whole.first)), mask)


@remembered
class SlotEncoder(nn.Module):
    """Read condition["slots"] (B, S) long, one token a slot; a slot that is 0 says nothing.

    values: how many values each slot may have, as in `SceneAttributes.values`. The first token stands for all slots,
    and alone for the null condition.
    """

    def __init__(self, values: Sequence[int], width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.values, self.width = tuple(values), width
        self.starts: Tensor
        starts = torch.tensor([0, *itertools.accumulate(self.values)][:-1])
        self.register_buffer("starts", starts, persistent=False)
        self.table = nn.Embedding(sum(self.values), width)
        self.whole = _Whole(width, layers, heads)

    def forward(self, condition: Condition | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, S + 1, width) and their mask."""
        if condition is None:
            slots = torch.zeros((len(like), len(self.values)), dtype=torch.long, device=like.device)
        else:
            slots = told(condition, "slots")
        return self.whole(self.table(slots + self.starts), slots > 0)
