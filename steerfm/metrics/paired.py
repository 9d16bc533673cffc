"""Two measurements on the same prompts and seeds: how far the values moved, and whether they fell.

The same noise makes both measurements, so that the standard error is that of the differences: much smaller than that
of either mean. It is over these samples: rows of one prompt are alike, and many prompts say more than many seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """Hold the mean of paired differences, its standard error, and of how many samples; NaN where they are too few."""

    mean: float
    error: float
    samples: int


def paired_change(before: Tensor, after: Tensor) -> Change:
    """Return how far values (N,), or K of them a sample (K, N), have moved; a sample's K differences are averaged.

    NaN stands for no opinion, and only pairs in which both have one are compared: nothing is won by silencing a judge.
    """
    differences = (after.double() - before.double()).reshape(-1, before.shape[-1]).nanmean(0)
    known = differences[~differences.isnan()]
    error = known.std() / len(known) ** 0.5 if len(known) > 1 else torch.nan
    return Change(float(known.mean()), float(error), len(known))


def fallen(change: Change, tolerance: float) -> bool:
    """Say whether the values fell by more than `tolerance` standard errors; never of fewer than two samples."""
    return change.mean < -tolerance * change.error
