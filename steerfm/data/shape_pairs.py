"""Pairs of scenes that differ in one respect: what a reward must tell apart."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from steerfm.data.batches import StepDataModule, own_rows
from steerfm.errors import ConfigError
from steerfm.images import to_model
from steerfm.seeds import generator
from steerfm.shape_captions import describe, plain
from steerfm.shape_edits import edited
from steerfm.shapes import Scene, render, sample_scene


class ShapePairs(StepDataModule):
    """Batches {"x0": (B, 3, size, size) in [-1, 1], "prompt": plain captions} in which neighbours are a pair.

    The second scene of a pair is the first one, edited (`steerfm.shape_edits.edited`): among the captions of a batch
    each picture so finds one that is almost right, and each caption such a picture. A pair mentions sizes and places
    alike; where an edit is of something that is not mentioned, both have one caption. batch_size: pictures a step,
    over all processes, an even share for each. Validation takes "held_out" scenes.
    """

    def __init__(self, batch_size: int = 256, size: int = 32, validation_size: int = 512, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 2 or batch_size % 2 or validation_size % 2:
            raise ConfigError(
                f"Pairs need an even batch_size and validation_size: got {batch_size}, {validation_size}."
            )
        self.batch_size = batch_size
        self.size = size
        self.validation_size = validation_size
        self.seed = seed

    def batch(self, step: int) -> dict[str, Any]:
        own = own_rows(self.batch_size // 2, "half of batch_size")
        pairs = range(step * self.batch_size // 2, (step + 1) * self.batch_size // 2)[own]
        return self._rows([generator(self.seed, "data", pair) for pair in pairs], "train")

    def validation_batch(self) -> dict[str, Any] | None:
        if self.validation_size == 0:
            return None
        return self._rows([generator(self.seed, "validation", i) for i in range(self.validation_size // 2)], "held_out")

    def _rows(self, generators: list[np.random.Generator], split: str) -> dict[str, Any]:
        scenes, prompts = [], []
        for rng in generators:
            scene = sample_scene(rng, split=split)
            pair = (scene, edited(scene, rng))
            scenes += pair
            prompts += _captions(pair, rng)
        return {"x0": to_model(render(scenes, self.size)), "prompt": prompts}


def _captions(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> list[str]:
    """Return captions of two scenes that mention the same things of both."""
    return [plain(describe(scene, copy.deepcopy(rng))) for scene in scenes]
