"""Best of n: draw n samples a seed, keep one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from steerfm.solvers import noising
from steerfm.steering.argmax import NOTE
from steerfm.steering.common import Outcome, Run, Steering, check_counts, check_temperature, pick
from steerfm.steering.populations import draw_by_weight, log_mean_exp
from steerfm.times import time_grid
from steerfm.types import State


@dataclass(frozen=True)
class BestOfN(Steering):
    """Draw n candidates a seed in `jumps` jumps each, and keep the best, or one by softmax of r / temperature.

    temperature None: argmax, which has no tilt as its target. With a temperature, one candidate is drawn with
    weights exp(r / temperature): consistent for the tilted density as n grows (importance sampling from the
    prior). Needs no gradient of the reward. A budget bounds the number of candidates. A partial map draws them as
    `renoised` does.
    """

    n: int = 16
    jumps: int = 4
    temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(n=self.n, jumps=self.jumps)
        check_temperature(self.temperature, allow_none=True)

    def steer(self, run: Run) -> Outcome:
        """Draw the candidates and choose."""
        pairs = len(run.seeds)
        x1 = run.noise(self.n).reshape(pairs, self.n, *run.flow_map.data_shape)
        drawn, judged = [], []
        for wave in run.waves(self.n):
            x0 = self._drawn(run, x1[:, wave].flatten(0, 1), wave)
            drawn.append(x0.reshape(pairs, -1, *x0.shape[1:]))
            judged.append(run.rewards(x0).reshape(pairs, -1))
            run.record(reward=torch.cat(judged, 1).max(1).values)
        particles, values = torch.cat(drawn, 1), torch.cat(judged, 1)
        if self.temperature is None:
            chosen = values.argmax(1)
            log_weights = torch.nn.functional.one_hot(chosen, values.shape[1]).to(values).log()
            return Outcome(pick(particles.flatten(0, 1), chosen), log_weights, particles, note=NOTE)
        log_weights = values.double() / self.temperature
        chosen = draw_by_weight(log_weights, run.seeds)
        evidence = log_mean_exp(log_weights)
        return Outcome(pick(particles.flatten(0, 1), chosen), log_weights.log_softmax(1), particles, evidence)

    def _drawn(self, run: Run, x: State, wave: slice) -> State:
        """Return x carried to data in `jumps` jumps; by a partial map to data and, with fresh noise, back each time."""
        for i, (s, t) in enumerate(itertools.pairwise(time_grid(self.jumps))):
            if not run.flow_map.partial:
                x = run.jump(x, s, t)
                continue
            x = run.look_ahead(x, s)
            if t > 0:
                kept, std = noising(run.flow_map.path, 0.0, t)
                fresh = run.noise(self.n, "step", i).reshape(len(run.seeds), self.n, *x.shape[1:])
                x = kept * x + std * fresh[:, wave].flatten(0, 1)
        return x
