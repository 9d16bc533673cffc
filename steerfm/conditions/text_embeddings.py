"""The embeddings of a frozen, pretrained text encoder."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.building import remembered
from steerfm.conditions.text_encoders import TextModel, load_text_model
from steerfm.errors import ConfigError
from steerfm.types import Condition

log = logging.getLogger(__name__)

CACHE_BYTES = 2**28  # of embeddings of recent prompts


@remembered
class FrozenText(nn.Module):
    """Turn prompts into embeddings, Condition(embedding=(B, length, D) float32, embedding_mask=(B, length) bool).

    encoder, weights: where the encoder lies, see `steerfm.conditions.text_encoders.load_text_model`. length: the most
    tokens of a prompt, special ones counted; what is longer is cut, and that is warned about once.

    The encoder is loaded when the first prompt is read, and is no part of the map: neither its weights nor its tokens
    are trained, saved or copied; a saved map holds `encoder` and `weights` as they were written, and a relative path
    starts at the current folder. Every prompt is encoded by itself, in float32, so that its embedding depends on
    nothing else; recent ones are kept. The empty prompt is the null condition: zeros, none of which counts, so that
    the network's own token for the whole caption stands alone and is learnt. Networks read both with `TextEmbeddings`.
    """

    def __init__(self, encoder: str, length: int = 64, weights: str | None = None) -> None:
        super().__init__()
        if not isinstance(encoder, str) or not isinstance(weights, str | None):
            raise ConfigError("encoder and weights are saved with the map as text: pass str(path).")
        if length < 1:
            raise ConfigError(f"Prompts need a length of at least 1, got {length}.")
        self.encoder, self.length, self.weights = encoder, length, weights
        self._reader = _Reader(encoder, length, weights)
        self.place: Tensor  # follows the map to its device, where the encoder is put
        self.register_buffer("place", torch.zeros((), dtype=torch.uint8), persistent=False)

    @property
    def dimension(self) -> int:
        """The length D of an embedding; loads the encoder."""
        return self._reader.model.dimension

    def forward(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B prompts. Raises CheckpointError where the encoder cannot be loaded."""
        condition = self.null(len(prompts))
        for i, prompt in enumerate(prompts):
            if prompt.strip():
                tokens = self._reader.read(prompt, self.place.device)
                condition["embedding"][i, : len(tokens)] = tokens
                condition["embedding_mask"][i, : len(tokens)] = True
        return condition

    def null(self, n: int) -> Condition:
        """Return the null condition for n samples: nothing to look at."""
        embedding = torch.zeros(n, self.length, self.dimension, dtype=torch.float32)
        return Condition({"embedding": embedding, "embedding_mask": torch.zeros(n, self.length, dtype=torch.bool)})


class _Reader:
    """Hold the encoder outside the module tree, and what it made of recent prompts; copies of a map share it."""

    def __init__(self, encoder: str, length: int, weights: str | None) -> None:
        self.encoder, self.length, self.weights = encoder, length, weights
        self.recent: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0
        self._model: TextModel | None = None
        self._warned = False

    def __deepcopy__(self, memo: Any) -> _Reader:
        return self

    def __reduce__(self) -> Any:
        return _Reader, (self.encoder, self.length, self.weights)  # another process loads the encoder itself

    @property
    def model(self) -> TextModel:
        if self._model is None:
            model = load_text_model(self.encoder, self.weights)
            if model.most is not None and self.length > model.most:
                raise ConfigError(f"'{self.encoder}' reads {model.most} tokens, got length={self.length}: lower it.")
            self._model = model
        return self._model

    def read(self, prompt: str, device: torch.device) -> Tensor:
        """Return the embeddings (n, D) of a prompt on the CPU, n at most `length`."""
        if prompt in self.recent:
            self.recent.move_to_end(prompt)
            return self.recent[prompt]
        self.model.module.to(device)
        # What is kept must serve training too, so it may be neither an inference tensor nor rounded by autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            tokens, count = self.model.embed(prompt, self.length)
            tokens = tokens.float().cpu().clone()
        if count > self.length and not self._warned:
            self._warned = True
            log.warning("'%s' reads the first %d tokens of a prompt, and '%s' has %d; longer ones are cut without "
                        "another word.", self.encoder, self.length, prompt, count)  # fmt: skip
        self._keep(prompt, tokens)
        return tokens

    def _keep(self, prompt: str, tokens: Tensor) -> None:
        self.recent[prompt] = tokens
        self.bytes += tokens.nbytes
        while self.bytes > CACHE_BYTES:
            self.bytes -= self.recent.popitem(last=False)[1].nbytes
