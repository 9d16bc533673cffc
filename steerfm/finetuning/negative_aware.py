"""Negative-aware fine-tuning (DiffusionNFT): learn from good and bad samples at once, round after round.

v± = v_old ± b (v_theta - v_old),    L = rho |v+ - w|^2 + (1 - rho) |v- - w|^2,    x0 from the map of the round's start

rho = 1/2 + (r - center) / divisor, cut to [0, 1]. A round moves the velocity by (2 / b) Cov(rho, w | x_t), so that n
rounds tilt to first order at the temperature T = divisor b / (2 n): b follows from T and n, there is no anchor, and the
run ends after n rounds. Any reward will do; its constants come from `steerfm reward calibrate` on the base and stay.
Reference: Zheng et al. 2025, arXiv 2509.16117.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Tuned, by_row, draws_of, renoised
from steerfm.objectives.teachers import Rounds
from steerfm.objectives.weights import mean_square
from steerfm.steering.common import check_counts


@dataclass(frozen=True)
class NegativeAware(FineTuning):
    """Fine-tune in `rounds` rounds of `every` optimiser steps; the run ends after the last.

    center, divisor: of the reward, such as its mean on the base and six times its standard deviation, so that few are
    cut; the figure "cut" says how many. jumps: in which the round's map draws samples, at `repeats` noisy states of
    each. First order in the reward: biased where it bends.
    """

    center: float
    divisor: float
    rounds: int = 10
    every: int = 20
    jumps: int = 4
    repeats: int = 4
    old: Rounds = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_counts(rounds=self.rounds, every=self.every, jumps=self.jumps, repeats=self.repeats)
        if not self.divisor > 0:
            raise ConfigError(f"divisor brings rewards to [0, 1] and must be positive, got {self.divisor}.")
        object.__setattr__(self, "old", Rounds(0, self.every))

    @property
    def steps(self) -> int:
        return self.rounds * self.every

    def __call__(self, batch: Batch) -> Tuned:
        old = self.old.map
        x0, scores = draws_of(old, batch, self.jumps)
        wanted = 0.5 + (scores.total - self.center) / self.divisor
        rho = wanted.clamp(0, 1)
        b = 2 * self.rounds * batch.temperature / self.divisor
        x_t, t, w = renoised(batch, x0, self.repeats)
        condition = batch.times(self.repeats)
        v_old = old.velocity(x_t, t, condition).detach()
        change = b * (batch.flow_map.velocity(x_t, t, condition) - v_old)
        good, bad = mean_square(v_old + change - w), mean_square(v_old - change - w)
        shares = rho.repeat_interleave(self.repeats)
        loss = by_row(shares * good + (1 - shares) * bad, self.repeats)
        return Tuned(loss, x0, scores.total, scores.parts, {"cut": (wanted != rho).to(rho)})
