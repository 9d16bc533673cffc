"""The true score of prompt following for pictures of shapes: what a learnt reward only guesses.

Model: none; the objects are parsed from the pixels (steerfm/shapes.py) and compared with what the caption asks for
(steerfm/shape_captions.py), about 0.5 ms a picture of 32 pixels on one CPU thread. Preprocessing: none, RGB in
[0, 1] on black. Range: [0, 1]; true scenes score 1. Licence: as steerfm. Memory: none.
Fooled by: what the parser does not look at. It ignores patches under 1.2% of the picture and everything under half
brightness, so that specks, streaks and a dim second object cost nothing; a shape may be 20% off, and a colour 18
degrees. Near a diagonal (1.5% of the side) two places are right. "color" and "shape" do not count what is too much,
so that a picture of everything has both; "count" and "correct" do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerfm.errors import DataError, RewardError, nearest
from steerfm.reward import Reward
from steerfm.shape_captions import Followed, follow, read
from steerfm.shapes import patches

PARTS = ("correct", "graded", "color", "shape", "count", "binding", "position")


class ShapePrompts(Reward):
    """Score how well a picture of shapes follows its caption; a black box.

    part: "correct", 1 where all is right, else 0; "graded", the mean of the parts that apply (which is 1 where all
    is right); or one of them: "color", "shape", "count", "binding", "position" (see `shape_captions.Followed`).
    """

    differentiable = False

    def __init__(self, part: str = "correct", name: str | None = None) -> None:
        super().__init__(name)
        if part not in PARTS:
            raise RewardError(f"'{self.name}' has no part '{part}'{nearest(part, PARTS) or '.'} Parts: {PARTS}.")
        self.part = part

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the part; (B,). Raises RewardError for a caption that cannot be read, or pictures of another form."""
        try:
            wanted = [read(prompt) for prompt in prompts]
            scenes = patches(images)
        except DataError as error:
            raise RewardError(f"'{self.name}' scores pictures of shapes against their captions. {error}") from error
        followed = [follow(description, scene) for description, scene in zip(wanted, scenes, strict=True)]
        values = [self._value(each, prompt) for each, prompt in zip(followed, prompts, strict=True)]
        return torch.tensor(values, device=images.device)

    def _value(self, followed: Followed, prompt: str) -> float:
        if self.part == "graded":
            parts = (followed.color, followed.shape, followed.count, followed.binding, followed.position)
            applying = [value for value in parts if value is not None]
            return sum(applying) / len(applying)
        value = getattr(followed, self.part)
        if value is None:
            raise RewardError(f"'{self.name}' scores positions, and '{prompt}' asks for none: use part='graded'.")
        return float(value)
