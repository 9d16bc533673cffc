"""Shapes: scenes of one to three coloured shapes with captions, drawn anew at every step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from torch import Tensor

from steerfm.data.batches import StepDataModule, own_rows
from steerfm.errors import ConfigError
from steerfm.images import to_model
from steerfm.seeds import generator
from steerfm.shape_captions import describe, plain, say
from steerfm.shapes import Scene, render, sample_scene

REFERENCE_SEED, PROMPT_SEED = 1_000_003, 1_000_033  # far from those that training counts up from


class Shapes(StepDataModule):
    """Batches {"x0": (B, 3, size, size) in [-1, 1], "prompt": captions such as "a red circle left of a blue square"}.

    batch_size: scenes a step, over all processes. count: objects a scene; None draws 1, 2 or 3. split: "train",
    "held_out" (combinations of objects that never come together in "train") or "unseen" (see
    `steerfm.shapes.UNSEEN`); validation takes "held_out". wordings: False says every scene in the plainest words.
    """

    def __init__(
        self,
        batch_size: int = 128,
        size: int = 32,
        count: int | None = None,
        split: str = "train",
        wordings: bool = True,
        validation_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or size < 16:
            raise ConfigError(f"Shapes need a batch_size of at least 1 and a size of 16, got {batch_size} and {size}.")
        self.batch_size = batch_size
        self.size = size
        self.count = count
        self.split = split
        self.wordings = wordings
        self.validation_size = validation_size
        self.seed = seed
        sample_scene(generator(seed, "data"), count, split)  # raises where they are wrong, before training starts

    def batch(self, step: int) -> dict[str, Any]:
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)[own_rows(self.batch_size)]
        return self._rows([generator(self.seed, "data", row) for row in rows], self.split)

    def validation_batch(self) -> dict[str, Any] | None:
        if self.validation_size == 0:
            return None
        return self._rows([generator(self.seed, "validation", i) for i in range(self.validation_size)], "held_out")

    def _rows(self, generators: list[np.random.Generator], split: str) -> dict[str, Any]:
        scenes = [sample_scene(rng, self.count, split) for rng in generators]
        prompts = [self._caption(scene, rng) for scene, rng in zip(scenes, generators, strict=True)]
        return {"x0": to_model(render(scenes, self.size)), "prompt": prompts}

    def _caption(self, scene: Scene, rng: np.random.Generator) -> str:
        description = describe(scene, rng)
        return say(description, rng) if self.wordings else plain(description)


def shape_prompts(
    n: int, count: int | None = None, split: str = "held_out", seed: int = 0, distinct: bool = False
) -> list[str]:
    """Return n prompts of held-out scenes, in varied wordings, of `count` objects (None: 1 to 3).

    distinct: none of them twice, as comparisons want. Raises ConfigError where there are not so many.
    """
    rng = generator(PROMPT_SEED + seed, "data")
    drawn = [sample_scene(rng, count, split) for _ in range(50 * n if distinct else n)]
    prompts = (say(describe(scene, rng), rng) for scene in drawn)
    found = list(itertools.islice(dict.fromkeys(prompts), n)) if distinct else list(prompts)
    if len(found) < n:
        raise ConfigError(f"There are not {n} prompts that differ: {len(found)} were found, so ask for fewer.")
    return found


def shape_pictures(n: int = 2000, count: int | None = None, size: int = 32, split: str = "held_out") -> Tensor:
    """Return pictures of n scenes in model space, (n, 3, size, size): what samples are compared with."""
    rng = generator(REFERENCE_SEED, "data")
    return to_model(render([sample_scene(rng, count, split) for _ in range(n)], size))


def shape_picture(index: int = 0, count: int | None = None, size: int = 32) -> Tensor:
    """Return one held-out scene as a picture (3, size, size) in [0, 1]: the truth of an inverse problem."""
    return render([sample_scene(generator(REFERENCE_SEED, "validation", index), count, "held_out")], size)[0]
