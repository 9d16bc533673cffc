"""Zero-order search: move the initial noise to the best of its neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from steerfm.errors import ConfigError
from steerfm.sampling import few_jumps
from steerfm.steering.argmax import Argmax, found
from steerfm.steering.common import Outcome, Run, best, check_counts
from steerfm.types import State, Values, unsqueeze_like


@dataclass(frozen=True)
class ZeroOrderSearch(Argmax):
    """Compare a noise, the pivot, with `neighbours` of it a round, and make the best of them the next pivot.

    rounds, neighbours: network calls are 1 + rounds * neighbours, times `jumps`. similarity: the cosine between a
    neighbour and the pivot; both have one norm, hence one density. The pivot stays where no neighbour is better. Needs
    no gradient. A budget bounds the rounds. Reference: Ma et al. 2025, arXiv 2501.09732 (zero-order search).
    """

    rounds: int = 16
    neighbours: int = 4
    similarity: float = 0.95
    jumps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(rounds=self.rounds, neighbours=self.neighbours, jumps=self.jumps)
        if not -1 <= self.similarity < 1:
            raise ConfigError(f"similarity is a cosine below 1, got {self.similarity}: at 1 all neighbours are equal.")

    def steer(self, run: Run) -> Outcome:
        """Move the pivots."""
        pivot = run.noise()
        if pivot[0].numel() == 1:
            raise ConfigError(
                "ZeroOrderSearch turns a noise on its sphere, which needs 2 dimensions, got 1: use BestOfN."
            )
        x0, values = self._judge(run, pivot)
        for i in run.rounds(self.rounds):
            noise = run.noise(self.neighbours, "step", i)
            z = turned(pivot.repeat_interleave(self.neighbours, 0), noise, self.similarity)
            found_x0, found_values = self._judge(run, z)
            judged = found_values.reshape(len(pivot), -1)
            better = judged.max(1).values > values
            pivot = torch.where(unsqueeze_like(better, pivot), best(judged, z), pivot)
            x0 = torch.where(unsqueeze_like(better, x0), best(judged, found_x0), x0)
            values = torch.maximum(judged.max(1).values, values)
            run.record(reward=values, look_ahead=x0)
        return found(x0)

    def _judge(self, run: Run, z: State) -> tuple[State, Values]:
        """Return x0 of each noise, and its reward."""
        x0 = run.rows(lambda z, condition: few_jumps(run.flow_map, z, self.jumps, condition), z)
        return x0, run.rewards(x0)


def turned(z: State, noise: State, similarity: float) -> State:
    """Return |z| (c z / |z| + sqrt(1 - c^2) w), w the unit vector along what of the noise is orthogonal to z.

    All (B, *dim), of two dimensions or more.
    """
    flat, other = z.flatten(1), noise.flatten(1)
    length = flat.norm(dim=1, keepdim=True)
    unit = flat / length
    other = other - (other * unit).sum(1, keepdim=True) * unit
    w = other / other.norm(dim=1, keepdim=True)
    return (length * (similarity * unit + math.sqrt(1 - similarity**2) * w)).reshape(z.shape)
