"""Texts for rewards: embedded once each, kept by text, and a warning where a model would cut one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CACHED_TEXTS = 4096
TEXTS_AT_ONCE = 256


@dataclass
class TextEmbeddings:
    """Embed texts by `encode`: (texts, device) -> (N, D), without gradient; the embeddings are kept by text.

    `tokens_of` counts a text's tokens before it is cut to `limit`; `owner`, the reward's name, warns of one that
    is longer, once.
    """

    owner: str
    limit: int
    tokens_of: Callable[[str], int]
    encode: Callable[[list[str], torch.device], Tensor]
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False)
    _warned: bool = field(default=False, init=False)

    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Return the embeddings of texts; (N, D)."""
        known = {text: self._kept[text] for text in texts if text in self._kept}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        self._warn_of_cuts(new)
        for start in range(0, len(new), TEXTS_AT_ONCE):
            some = new[start : start + TEXTS_AT_ONCE]
            with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable with gradients later
                known |= dict(zip(some, self.encode(some, device), strict=True))
        if len(self._kept) + len(new) > CACHED_TEXTS:
            self._kept.clear()
        self._kept |= known
        return torch.stack([known[text].to(device) for text in texts])

    def _warn_of_cuts(self, texts: list[str]) -> None:
        cut = next((text for text in texts if self.tokens_of(text) > self.limit), None) if not self._warned else None
        if cut is None:
            return
        self._warned = True
        log.warning(
            "'%s' reads the first %d tokens of a prompt and ignores the rest; '%s' has %d. Said once.",
            self.owner,
            self.limit,
            cut,
            self.tokens_of(cut),
        )
