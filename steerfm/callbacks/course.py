"""The course of a fine-tuning on samples that stay the same: which measurement was best, and when to stop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steerfm.metrics.paired import Change, fallen, paired_change


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

    They part where an earlier map, the `rival`, had less reward and held-out rewards higher by more than `tolerance`
    standard errors: the reward won since then was paid for. The peak of the held-out rewards is no such measure. While
    the learning rate is high a map gets worse and better again, its reward with it, and that is no hacking; and a
    reward at its ceiling need not rise on. Without a reward (None) every earlier map counts as one of less.

    parted: at how many measurements in a row they had parted. over: at `patience` of them; never for None. best: the
    measurement of the highest held-out rewards whose divergence is at most `largest_divergence` (None: any). front: the
    measurements to which no other with less reward comes up; the rivals are among them.
    """

    tolerance: float = 2.0
    patience: int | None = 2
    largest_divergence: float | None = None
    front: list[Measurement] = dataclasses.field(default_factory=list)
    rival: Measurement | None = None
    best: Measurement | None = None
    parted: int = 0

    def take(self, now: Measurement) -> bool:
        """Take a measurement in, and say whether it is the best so far; without held-out rewards none is."""
        if len(now.held_out) == 0:
            return False
        self.rival = None
        for each in self.front:
            if _less_reward(each, now) and (self.rival is None or _higher(self.rival, each)):
                self.rival = each
        parts = self.rival is not None and fallen(held_out_change(self.rival, now), self.tolerance)
        self.parted = self.parted + 1 if parts else 0
        if self.rival is None or _higher(self.rival, now):
            self.front = [each for each in self.front if _less_reward(each, now) or _higher(now, each)] + [now]
        bounded = self.largest_divergence is None or now.divergence <= self.largest_divergence
        if bounded and (self.best is None or _higher(self.best, now)):
            self.best = now
        return self.best is now

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.parted >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what has to be remembered, as plain data and tensors."""
        best = None if self.best is None else dataclasses.asdict(self.best)
        return {"front": [dataclasses.asdict(each) for each in self.front], "best": best, "parted": self.parted}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.front = [Measurement(**each) for each in state["front"]]
        self.best = None if state["best"] is None else Measurement(**state["best"])
        self.rival, self.parted = None, state["parted"]


def reward_change(then: Measurement, now: Measurement) -> Change | None:
    """Return how far the reward has moved between two measurements; None where there is none."""
    return None if then.reward is None or now.reward is None else paired_change(then.reward, now.reward)


def held_out_change(then: Measurement, now: Measurement) -> Change:
    """Return how far the held-out rewards have moved between two measurements."""
    return paired_change(then.held_out, now.held_out)


def _less_reward(then: Measurement, now: Measurement) -> bool:
    change = reward_change(then, now)
    return change is None or not change.mean <= 0  # NaN, no opinion, is no reward


def _higher(then: Measurement, now: Measurement) -> bool:
    return held_out_change(then, now).mean > 0
