"""Prompt following: do pictures of shapes show what their captions ask for, part by part.

A parser reads the objects from the pixels (steerfm/shapes.py), a reader what the caption asks for
(steerfm/shape_captions.py), and the two are compared. The parts are GenEval's: colours, objects, counting, attributes
bound to the right object, position (Ghosh et al. 2023, arXiv 2310.11513); no network judges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.shape_captions import follow, read
from steerfm.shapes import patches

PARTS = ("color", "shape", "count", "binding", "position", "correct")


@dataclass(frozen=True)
class Share:
    """Hold the mean of n values in [0, 1] and its standard error; NaN where n is too small for one."""

    mean: float
    standard_error: float
    n: int


@dataclass(frozen=True)
class PromptFollowing:
    """Hold how well pictures follow their captions: each part's mean, and `values`, each picture's own, (B,) by part.

    color, shape: wanted colours and shapes that are there. count: as many objects as wanted, and nothing else as
    large. binding: wanted objects that are there with all their attributes. position: over the prompts that ask for
    one (its n; NaN in `values` for the others), wanted objects that lie as asked. correct: all of it right.
    """

    color: Share
    shape: Share
    count: Share
    binding: Share
    position: Share
    correct: Share
    values: dict[str, Tensor]


def prompt_following(images: Tensor, prompts: Sequence[str]) -> PromptFollowing:
    """Return how well pictures (B, 3, H, H) in [0, 1] follow their B captions of shapes, judged one by one.

    Its floor: true scenes of 32 pixels and more score exactly 1 in every part. Chance: 2000 pictures of held-out
    scenes, with captions shifted by one, score 0.29 in color, 0.35 shape, 0.36 count, 0.07 binding, 0.001 position
    and 0.009 correct.
    Raises DataError for captions that cannot be read and for pictures that are no finite square RGB pictures.
    """
    if isinstance(prompts, str) or len(prompts) != len(images):
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise DataError(f"Prompt following needs one prompt a picture, got {got} for {len(images)} pictures.")
    wanted = [read(prompt) for prompt in prompts]
    followed = [follow(description, scene) for description, scene in zip(wanted, patches(images), strict=True)]
    rows = [[getattr(each, part) for part in PARTS] for each in followed]
    numbers = [[math.nan if value is None else value for value in row] for row in rows]
    columns = torch.tensor(numbers, dtype=torch.float64).reshape(len(rows), len(PARTS)).unbind(1)
    values: dict[str, Tensor] = dict(zip(PARTS, columns, strict=True))
    return PromptFollowing(**{part: _share(column) for part, column in values.items()}, values=values)


def _share(values: Tensor) -> Share:
    """Return the mean of the values that are not NaN."""
    asked = values[~values.isnan()]
    n = len(asked)
    error = float(asked.std()) / math.sqrt(n) if n > 1 else math.nan
    return Share(float(asked.mean()), error, n)
