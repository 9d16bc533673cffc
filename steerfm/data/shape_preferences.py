"""Preferences between scenes by a judge whose noise is known, so that the best possible figures are known too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from steerfm.data.batches import StepBatches, StepDataModule, own_rows
from steerfm.data.gallery import check_sizes
from steerfm.errors import ConfigError
from steerfm.seeds import generator
from steerfm.shape_captions import describe, follow, plain
from steerfm.shape_edits import edited
from steerfm.shapes import render, sample_scene


class ShapePreferences(StepDataModule):
    """Batches as PreferencePairs gives, of a scene that follows its caption and one edited in one respect.

    The judge prefers a with probability sigmoid((q_a - q_b) / temperature), which is in the batch as "odds", where q
    is 1 for a scene that follows the caption in everything, else 0. Edits of what the caption does not mention make
    both 1, and the judge throws a coin. batch_size: pairs a step, over all processes; every step has new ones.
    Validation takes "held_out" scenes, always the same.
    """

    def __init__(
        self,
        batch_size: int = 64,
        size: int = 32,
        temperature: float = 0.5,
        validation_size: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(batch_size, validation_size)
        if not temperature > 0:
            raise ConfigError(f"The temperature of the judge must be positive, got {temperature}.")
        self.batch_size, self.size = batch_size, size
        self.temperature = temperature
        self.validation_size = validation_size
        self.seed = seed

    def batch(self, step: int) -> dict[str, Any]:
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[own_rows(self.batch_size)]
        return self._rows([generator(self.seed, "data", i) for i in numbers], "train")

    def val_dataloader(self) -> DataLoader | list:
        if self.validation_size == 0:
            return []
        batches = self.validation_size // self.batch_size + (self.validation_size % self.batch_size > 0)
        return DataLoader(StepBatches(self._held_out, batches), batch_size=None)

    def _held_out(self, step: int) -> dict[str, Any]:
        numbers = range(self.validation_size)[step * self.batch_size : (step + 1) * self.batch_size]
        return self._rows([generator(self.seed, "validation", i) for i in numbers], "held_out")

    def _rows(self, generators: list[np.random.Generator], split: str) -> dict[str, Any]:
        first, second, prompts, odds, preferred = [], [], [], [], []
        for rng in generators:
            scene = sample_scene(rng, split=split)
            description = describe(scene, rng)
            other = edited(scene, rng)
            a, b = (scene, other) if rng.random() < 0.5 else (other, scene)
            gap = follow(description, a).correct - follow(description, b).correct
            first.append(a)
            second.append(b)
            prompts.append(plain(description))
            odds.append(1 / (1 + math.exp(-gap / self.temperature)))
            preferred.append(float(rng.random() < odds[-1]))
        return {
            "image_a": render(first, self.size),
            "image_b": render(second, self.size),
            "prompt": prompts,
            "odds": torch.tensor(odds),
            "preferred": torch.tensor(preferred),
        }
