"""Optimisation of the initial noise: gradient ascent of the reward through a few jumps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.errors import ConfigError
from steerfm.sampling import few_jumps
from steerfm.steering.argmax import Argmax, found
from steerfm.steering.common import Outcome, Run, best, check_counts
from steerfm.times import time_grid
from steerfm.types import Condition, State, unsqueeze_like


@dataclass(frozen=True)
class NoiseOptimisation(Argmax):
    """Climb r(F(z, 1, 0)) + norm_weight log p(|z|) from a pair's own noise, and keep the best x0 that was met.

    candidates: it begins at the best of so many noises, each judged without a gradient; 1 is the pair's own. jumps:
    from noise to data: 1 to 4 are meant. last: how many of them are differentiated, all by default; those before count
    as the identity, which bounds memory and is biased. iterations: how many noises are judged with a gradient, that at
    which it begins among them. rate, momentum: of Nesterov's ascent. clip: the gradient's largest norm, sample by
    sample. norm_weight: of the logarithm of the norm's density under N(0, I), which leaves the direction free; the best
    is chosen by the reward alone. Needs a differentiable reward; its scale matters beside norm_weight. A budget bounds
    the iterations. Reference: Eyring et al. 2024, arXiv 2406.04312 (ReNO), whose defaults these are.
    """

    jumps: int = 1
    iterations: int = 50
    rate: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    norm_weight: float = 0.01
    last: int | None = None
    candidates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(jumps=self.jumps, iterations=self.iterations, candidates=self.candidates)
        if not 1 <= self._with_gradient <= self.jumps:
            raise ConfigError(f"last must lie between 1 and jumps, got last={self.last} and jumps={self.jumps}.")
        for name in ("rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), got {self.momentum}.")
        if not self.norm_weight >= 0:
            raise ConfigError(f"norm_weight must be at least 0, got {self.norm_weight}.")

    @property
    def needs_gradient(self) -> bool:
        return True

    def steer(self, run: Run) -> Outcome:
        """Climb, and keep the best."""

        first, times = self.jumps - self._with_gradient, time_grid(self.jumps)

        def carry(z: State, condition: Condition | None) -> State:
            x = z
            if first:
                with torch.no_grad():
                    reached = few_jumps(run.flow_map, z, times[: first + 1], condition)
                x = z + (reached - z).detach()
            return few_jumps(run.flow_map, x, times[first:], condition)

        z = run.noise(self.candidates)
        if self.candidates > 1:
            z = best(run.rewards(run.rows(carry, z)).reshape(len(run.seeds), -1), z)
        speed, x0 = torch.zeros_like(z), z
        highest = z.new_full((len(z),), -torch.inf)
        for _ in run.rounds(self.iterations):
            reached, values, gradient = run.reward_gradient(z, carry)
            x0 = torch.where(unsqueeze_like(values > highest, x0), reached, x0)
            highest = torch.maximum(values, highest)
            run.record(reward=values, look_ahead=reached)
            gradient = clipped(gradient + self.norm_weight * norm_gradient(z), self.clip)
            speed = self.momentum * speed + gradient
            z = z + self.rate * (gradient + self.momentum * speed)
        return found(x0)

    @property
    def _with_gradient(self) -> int:
        return self.jumps if self.last is None else self.last


def norm_gradient(z: State) -> State:
    """Return the gradient of log p(|z|) = (d - 1) log |z| - |z|^2 / 2 + const, the chi density; (B, *dim) each.

    It is zero at |z|^2 = d - 1, where log N(z), not meant here, would pull to the origin.
    """
    squared = z.flatten(1).square().sum(1)
    return unsqueeze_like((z[0].numel() - 1) / squared - 1, z) * z


def clipped(gradient: State, largest: float) -> State:
    """Return the gradient with each sample's norm at most `largest`; (B, *dim) each."""
    norm = gradient.flatten(1).norm(dim=1)
    return unsqueeze_like((largest / norm).clamp_max(1.0), gradient) * gradient
