"""Beam search and path search: look ahead from noisy children, go on from those whose look-ahead is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steerfm.errors import ConfigError
from steerfm.solvers import check_share, noising
from steerfm.steering.argmax import Argmax, best_rows, found
from steerfm.steering.common import Outcome, Run, check_counts
from steerfm.times import time_grid


@dataclass(frozen=True)
class BeamSearch(Argmax):
    """Keep `beams` states a pair, give each `children` at the next time, and keep those with the best look-ahead.

    beams, children: a pair's states and their children; it begins with beams * children noises. steps: equal steps of
    time. gamma: a child is a jump past its time t to (1 - gamma) t, and fresh noise back to t; with gamma 1 the jump
    is the look-ahead itself and a step costs beams * children network calls, otherwise `beams` more. The children
    compete over all beams of a pair. What is returned is the best look-ahead of the last step, whose time is
    1 / steps. Needs no gradient.
    """

    beams: int = 4
    children: int = 4
    steps: int = 4
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(beams=self.beams, children=self.children, steps=self.steps)
        check_share("gamma", self.gamma)
        if self.gamma == 0 and self.children > 1:
            raise ConfigError("gamma=0 adds no noise, and the children of a beam would be alike: raise it.")

    def steer(self, run: Run) -> Outcome:
        """Search from noise to data."""
        return _search(run, self.beams, self.children, time_grid(self.steps), lambda t: (1 - self.gamma) * t)


@dataclass(frozen=True)
class PathSearch(Argmax):
    """Jump down by `down`, noise up by `up` in `children` ways, keep the `beams` with the best look-ahead, and again.

    up, down: in time, 0 < up < down; every round so ends `down` - `up` nearer to data, and the last is followed by the
    look-ahead. A child is judged before its jump down, not after it: along the flow of an exact map the look-ahead is
    the same, and only survivors pay for the jump. It begins with beams * children noises; a round costs `beams` *
    (children + 1) network calls. Needs no gradient. Reference: Ma et al. 2025, arXiv 2501.09732 (search over paths).
    """

    beams: int = 4
    children: int = 4
    up: float = 0.25
    down: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(beams=self.beams, children=self.children)
        if not 0 < self.up < self.down <= 1:
            raise ConfigError(f"up and down are times with 0 < up < down <= 1, got {self.up} and {self.down}.")

    def steer(self, run: Run) -> Outcome:
        """Search from noise to data."""
        rounds = int((1 - self.up) / (self.down - self.up) + 1e-9)  # that begin at or above data
        times = [1 - i * (self.down - self.up) for i in range(rounds + 1)]
        return _search(run, self.beams, self.children, [*times, 0.0], lambda t: max(round(t - self.up, 12), 0.0))


def _search(run: Run, beams: int, children: int, times: Sequence[float], below: Callable[[float], float]) -> Outcome:
    """Return the best look-ahead from the last time above 0; children at t are noised up from below(t)."""
    x = clean = run.noise(beams * children)
    for i, s, t in run.steps(times):
        clean = run.look_ahead(x, s)
        values = run.rewards(clean).reshape(len(run.seeds), -1)
        kept = best_rows(values, beams)
        x, clean = x[kept], clean[kept]
        run.record(reward=values.max(1).values, look_ahead=clean[::beams])
        if t > 0:
            r = below(t)
            x = (clean if r == 0 else run.jump(x, s, r)).repeat_interleave(children, 0)
            kept_share, std = noising(run.flow_map.path, r, t)
            x = kept_share * x + std * run.noise(beams * children, "step", i)
    return found(clean[::beams])
