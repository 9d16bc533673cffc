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

    peak: the measurement of the highest held-out rewards. best: the same among those whose divergence is at most
    `largest_divergence` (None: any). parted: how many times in a row the reward had risen since the peak, and the
    held-out rewards had fallen by more than `tolerance` standard errors. over: at `patience` times; never for None.
    """

    tolerance: float = 2.0
    patience: int | None = 2
    largest_divergence: float | None = None
    peak: Measurement | None = None
    best: Measurement | None = None
    parted: int = 0

    def take(self, now: Measurement) -> bool:
        """Take a measurement in, and say whether it is the best so far; without held-out rewards none is."""
        if len(now.held_out) == 0:
            return False
        reward, held_out = changes(self.peak or now, now)
        self.parted = self.parted + 1 if part_ways(reward, held_out, self.tolerance) else 0
        if self.peak is None or held_out.mean > 0:
            self.peak = now
        bounded = self.largest_divergence is None or now.divergence <= self.largest_divergence
        if bounded and (self.best is None or changes(self.best, now)[1].mean > 0):
            self.best = now
        return self.best is now

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.parted >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what has to be remembered, as plain data and tensors."""
        peak, best = (None if each is None else dataclasses.asdict(each) for each in (self.peak, self.best))
        return {"peak": peak, "best": best, "parted": self.parted}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.peak, self.best = (None if state[key] is None else Measurement(**state[key]) for key in ("peak", "best"))
        self.parted = state["parted"]


def changes(then: Measurement, now: Measurement) -> tuple[Change | None, Change]:
    """Return how far the reward and the held-out rewards have moved between two measurements."""
    both = then.reward is not None and now.reward is not None
    reward = paired_change(then.reward, now.reward) if both else None  # type: ignore[arg-type]
    return reward, paired_change(then.held_out, now.held_out)
