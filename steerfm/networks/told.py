"""What networks of pictures are told besides the state: times, class, text, guidance, and a picture laid beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.errors import ConfigError
from steerfm.networks.embeddings import ClassEmbedding, GuidanceEmbedding, TimeEmbedding, conditioning
from steerfm.networks.text import told
from steerfm.types import Condition, State, Times


class Told(nn.Module):
    """Embed what a network is told; U-Net and DiT build on it.

    width: features of the embedding. tokens: features of a token of the text, None without one. channels_in: of the
    state and what lies beside it.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        width: int,
        num_classes: int,
        frequencies: int,
        max_rate: float,
        text: nn.Module | None,
        picture_channels: int,
        guidance_input: bool,
    ) -> None:
        super().__init__()
        self.data_shape = tuple(data_shape)
        self.time = TimeEmbedding(width, frequencies, max_rate)
        self.classes = ClassEmbedding(num_classes, width) if num_classes else None
        self.guidance_input = guidance_input
        self.guidance = GuidanceEmbedding(width) if guidance_input else None
        self.text, self.picture_channels = text, picture_channels
        self.tokens = None if text is None else int(text.width)  # type: ignore[arg-type]
        self.caption = None if self.tokens is None else nn.Linear(self.tokens, width)
        self.channels_in = self.data_shape[0] + (picture_channels + 1 if picture_channels else 0)

    def read(self, x: State, condition: Condition | None) -> tuple[Tensor, Tensor] | None:
        """Return the text's tokens (B, L, tokens) and their mask (B, L); None without a text."""
        return None if self.text is None else self.text(condition, x)

    def told(self, s: Times, t: Times, condition: Condition | None, text: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return times, class, guidance scale and caption as one vector, (B, width); text: as `read` gives it."""
        needs = self.text is not None or self.picture_channels > 0
        embedding = conditioning(self.time, self.classes, s, t, condition, guidance=self.guidance, other=needs)
        if text is not None and self.caption is not None:
            embedding = embedding + self.caption(text[0][:, 0])
        return functional.silu(embedding)

    def beside(self, x: State, condition: Condition | None) -> Tensor:
        """Return the state with the condition's picture laid beside it, zeros where there is none."""
        if not self.picture_channels:
            return x
        if condition is None:
            return torch.cat([x, x.new_zeros(len(x), self.picture_channels + 1, *x.shape[2:])], 1)
        picture = told(condition, "picture")
        wanted, got = (self.picture_channels + 1, *x.shape[2:]), tuple(picture.shape[1:])
        if got != wanted:
            raise ConfigError(
                f"The network reads pictures {wanted}, mask included, and the condition has {got}: "
                f"write Pictures(channels={self.picture_channels}, size={tuple(x.shape[2:])})."
            )
        return torch.cat([x, picture.to(x)], 1)
