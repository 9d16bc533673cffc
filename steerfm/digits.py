"""scikit-learn's 1797 handwritten digits as 8x8 pictures with captions; they come with the package, nothing is
downloaded.

The scans are split once into two halves, stratified by class: rewards learn from "reward", judges from "judge",
so that a judge is fitted on scans that no reward has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import DataError, nearest

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = [f"a handwritten {name}" for name in NAMES]
SPLITS = ("all", "reward", "judge")
SPLIT_SEED = 0  # of the permutation that halves every class


@dataclass(frozen=True)
class Scans:
    """Hold scans: x0 (N, 1, 8, 8) float32 in [-1, 1], white strokes on black; labels (N,) long; one caption a scan."""

    x0: Tensor
    labels: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.x0)


def load(split: str = "all") -> Scans:
    """Return the scans of a split: "all", or its two disjoint halves "reward" and "judge".

    A pixel that scikit-learn gives as 0..16 becomes x / 8 - 1. Raises DataError for an unknown split.
    """
    if split not in SPLITS:
        near = nearest(split, SPLITS) or "."
        raise DataError(f"The digits have no split '{split}'{near} They have: {', '.join(SPLITS)}.")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    labels = np.asarray(digits.target)
    index = _indices(labels, split)
    x0 = torch.from_numpy(np.asarray(digits.images, dtype=np.float32)[index, None] / 8 - 1)
    chosen = labels[index]
    return Scans(x0, torch.from_numpy(chosen).long(), [CAPTIONS[label] for label in chosen])


def caption_variants(label: int) -> list[str]:
    """Return several ways to ask for a digit, CAPTIONS[label] first."""
    name = NAMES[label]
    return [
        CAPTIONS[label],
        f"a handwritten digit {name}",
        f"a handwritten {label}",
        f"the digit {name}",
        f"the digit {label}",
        f"the number {name}",
        f"a scan of a {name}",
        f"a {name} written by hand",
        f"please write the number {label}",
        name,
        str(label),
    ]


def paraphrases(caption: str) -> list[str]:
    """Return the variants of one of CAPTIONS, and any other text as it is."""
    return caption_variants(CAPTIONS.index(caption)) if caption in CAPTIONS else [caption]


def _indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Return the sorted places of a split's scans; a class of odd size gives "judge" the extra one."""
    if split == "all":
        return np.arange(len(labels))
    rng = np.random.default_rng(SPLIT_SEED)
    halves = {"reward": [], "judge": []}
    for label in range(len(NAMES)):
        places = rng.permutation(np.flatnonzero(labels == label))
        halves["reward"].append(places[: len(places) // 2])
        halves["judge"].append(places[len(places) // 2 :])
    return np.sort(np.concatenate(halves[split]))
