"""Attention of one sequence to itself or to another."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from steerfm.errors import ConfigError


class Attention(nn.Module):
    """Let a sequence (B, N, width) look at another (B, M, other), or at itself where there is none.

    mask: (B, M) bool, True where there is something to look at; every row needs one. Returns (B, N, width).
    """

    def __init__(self, width: int, heads: int, other: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"The heads of attention must divide its width, {width}: got {heads}.")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(other or width, 2 * width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        k, v = self.key_value(other).chunk(2, -1)
        q, k, v = (self._split(part) for part in (self.query(x), k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.leave(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
