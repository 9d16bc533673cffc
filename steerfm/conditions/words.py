"""The words of a caption, as numbers that a network embeds itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import nn

from steerfm.building import remembered
from steerfm.errors import ConfigError
from steerfm.types import Condition

log = logging.getLogger(__name__)

PADDING, UNKNOWN = 0, 1  # word i of the vocabulary is the number i + 2


@remembered
class CaptionWords(nn.Module):
    """Turn prompts into the numbers of their words, Condition(words=(B, length) long); 0 pads, 1 is unknown.

    vocabulary: the known words, lower case; punctuation and case are ignored. length: the most words of a prompt;
    what is longer is cut. Both an unknown word and a cut are warned about, once each. The empty prompt is the null
    condition. The words are embedded by the network (`steerfm.networks.WordEncoder`), so that a condition holds no
    gradient, and a tuned map and its reference each read it with weights of their own.
    """

    def __init__(self, vocabulary: Sequence[str], length: int = 32) -> None:
        super().__init__()
        self.vocabulary = list(vocabulary)
        self.length = length
        self.numbers = {word: i + 2 for i, word in enumerate(self.vocabulary)}
        if len(self.numbers) < len(self.vocabulary) or length < 1:
            raise ConfigError("A vocabulary needs different words, and prompts a length of at least 1.")
        self._warned: set[str] = set()

    def forward(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B prompts."""
        rows = [self._row(prompt) for prompt in prompts]
        return Condition({"words": torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.length)})

    def null(self, n: int) -> Condition:
        """Return the null condition for n samples: no words."""
        return Condition({"words": torch.full((n, self.length), PADDING)})

    def _row(self, prompt: str) -> list[int]:
        words = re.findall(r"[\w'-]+", prompt.lower())
        if len(words) > self.length:
            self._warn(prompt, f"The prompt '{prompt}' has {len(words)} words and is cut after {self.length}.")
        for word in words[: self.length]:
            if word not in self.numbers:
                known = ", ".join(self.vocabulary[:40])
                self._warn(word, f"The map does not know the word '{word}' and ignores what it means. Known: {known}.")
        numbers = [self.numbers.get(word, UNKNOWN) for word in words[: self.length]]
        return numbers + [PADDING] * (self.length - len(numbers))

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning("%s", text)
