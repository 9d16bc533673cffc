"""Class labels read off prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from steerfm.building import remembered
from steerfm.errors import ConfigError, nearest
from steerfm.types import Condition


@remembered
class Labels(nn.Module):
    """Turn a prompt into the class it names, and the empty prompt into the null class.

    classes: one caption a class, in the order of the labels, for example "a handwritten seven". A prompt
    names a class if it equals its caption, or the caption's last word, up to case and surrounding space.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = list(classes)
        names = [name.strip().lower() for name in self.classes]
        self.labels = {name: i for i, name in enumerate(names)}
        last_words = [name.split()[-1] for name in names]
        if len(set(last_words)) == len(names):
            self.labels |= {word: i for i, word in enumerate(last_words)}
        self.labels[""] = len(names)

    def forward(self, prompts: Sequence[str]) -> Condition:
        """Return Condition(label=(B,) long). Raises ConfigError for a prompt that names no class."""
        labels = []
        for prompt in prompts:
            name = prompt.strip().lower()
            if name not in self.labels:
                known, near = ", ".join(repr(c) for c in self.classes), nearest(name, self.labels) or "."
                raise ConfigError(f"No class is called '{prompt}'{near} Known: {known}, or ''.")
            labels.append(self.labels[name])
        return Condition({"label": torch.tensor(labels)})

    def null(self, n: int) -> Condition:
        """Return the null condition for n samples."""
        return Condition({"label": torch.full((n,), len(self.classes))})
