"""What the methods that keep the best share: they aim at the highest reward, not at a tilt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.steering.common import Outcome, Steering
from steerfm.types import State

NOTE = "argmax selection: no temperature, its target is not a tilt"


@dataclass(frozen=True, kw_only=True)
class Argmax(Steering):
    """Keep what has the highest reward. temperature: null, which says that there is none."""

    temperature: None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None:
            raise ConfigError(
                f"{type(self).__name__} keeps the best and has no temperature, got {self.temperature}: leave it out, "
                "or take a method that aims at the tilt, such as NoiseSampling."
            )


def found(x0: State) -> Outcome:
    """Return the outcome of a search, x0 (B, *dim), with its note."""
    return Outcome(x0, note=NOTE)


def best_rows(values: Tensor, count: int) -> Tensor:
    """Return which rows hold each pair's `count` highest values, the best first; (B, k) -> (B * count,) long."""
    first = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    return (first + values.topk(count, 1).indices).flatten()
