"""How a network reads a text: words that it embeds itself, or the embeddings of a frozen encoder."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.building import remembered
from steerfm.networks.attention import Attention
from steerfm.types import Condition


class TextEncoder(Protocol):
    """Read the text of a condition; `width` is that of a token."""

    width: int

    def __call__(self, condition: Condition | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L, width) and which of them count, (B, L) bool, the first one always."""
        ...


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
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, condition: Condition | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L + 1, width) and their mask."""
        if condition is None:
            words = torch.zeros((len(like), len(self.places) - 1), dtype=torch.long, device=like.device)
        else:
            words = condition["words"]
        whole = self.places[:1].expand(len(words), 1, -1)
        h = torch.cat([whole, self.words(words) + self.places[1 : words.shape[1] + 1]], 1)
        mask = functional.pad(words > 0, (1, 0), value=True)
        for layer in self.layers:
            h = layer(h, mask)
        return self.norm(h), mask
