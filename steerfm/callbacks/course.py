"""The course of a fine-tuning on samples that stay the same: which measurement was best, and when to stop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steerfm.metrics.paired import Change, paired_change, part_ways


@dataclass(frozen=True)
class Measurement:
    """Hold the rewards (N,) of N samples, K held-out rewards of each (K, N), and the divergence from the base.

    step: optimiser steps so far. reward: None where there is none. held_out: of one scale, NaN without an opinion.
    """

    step: int
    reward: Tensor | None
    held_out: Tensor
    divergence: float


@dataclass
class Course:
    """Take measurements in turn, and know the best and whether reward and held-out rewards part ways.

    start: the first measurement, of the base. peak: that of the highest held-out rewards. best: the same among those
    whose divergence is at most `largest_divergence` (None: any). parted: at how many measurements in a row the
    held-out rewards lay below the peak by more than `tolerance` standard errors, and the reward above the start; it
    need not rise on, since many a reward has a ceiling. over: at `patience` of them; never for None.
    """

    tolerance: float = 2.0
    patience: int | None = 2
    largest_divergence: float | None = None
    start: Measurement | None = None
    peak: Measurement | None = None
    best: Measurement | None = None
    parted: int = 0

    def take(self, now: Measurement) -> bool:
        """Take a measurement in, and say whether it is the best so far; without held-out rewards none is."""
        if len(now.held_out) == 0:
            return False
        self.start, self.peak = self.start or now, self.peak or now
        since_peak = held_out_change(self.peak, now)
        self.parted = self.parted + 1 if part_ways(reward_change(self.start, now), since_peak, self.tolerance) else 0
        if since_peak.mean > 0:
            self.peak = now
        bounded = self.largest_divergence is None or now.divergence <= self.largest_divergence
        if bounded and (self.best is None or held_out_change(self.best, now).mean > 0):
            self.best = now
        return self.best is now

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.parted >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what has to be remembered, as plain data and tensors."""
        kept = {"start": self.start, "peak": self.peak, "best": self.best}
        plain = {name: None if each is None else dataclasses.asdict(each) for name, each in kept.items()}
        return {**plain, "parted": self.parted}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.start, self.peak, self.best = (
            None if state[name] is None else Measurement(**state[name]) for name in ("start", "peak", "best")
        )
        self.parted = state["parted"]


def reward_change(then: Measurement, now: Measurement) -> Change | None:
    """Return how far the reward has moved between two measurements; None where there is none."""
    return None if then.reward is None or now.reward is None else paired_change(then.reward, now.reward)


def held_out_change(then: Measurement, now: Measurement) -> Change:
    """Return how far the held-out rewards have moved between two measurements."""
    return paired_change(then.held_out, now.held_out)
