"""Sampling in noise space: Markov chains that keep exp(r(F(z, 1, 0)) / temperature) N(z; 0, I).

Carried to data by F it is exactly p(x0) exp(r(x0) / temperature), p being the law of the map's own samples, however
good the map. Proposals, with step h > 0 and g the gradient of phi(z) = r(F(z, 1, 0)) / temperature,

    z' = ((2 - h) z + 2 h g(z) + sqrt(8 h) xi) / (2 + h),        xi ~ N(0, I),

leave N(0, I) as it is where g = 0, so that the prior's density never enters the acceptance, and h need not shrink as
dimensions grow. With the gradient this is pCNL, with g = 0 throughout pCN.

Reference: Cotter, Roberts, Stuart, White 2013, arXiv 1202.0709 (pCN and pCNL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from steerfm.errors import ConfigError
from steerfm.sampling import few_jumps
from steerfm.steering.common import Outcome, Run, check_counts, check_temperature
from steerfm.steering.populations import Populations
from steerfm.types import Condition, State, Values, unsqueeze_like

Kernel = Literal["pcnl", "pcn"]
# Optimal acceptance of Langevin and of random-walk proposals: Roberts, Rosenthal 2001, "Optimal scaling for various
# Metropolis-Hastings algorithms".
ACCEPTANCE = {"pcnl": 0.574, "pcn": 0.234}
LONGEST = 2.0  # at h = 2 a proposal forgets where it comes from


@dataclass(frozen=True)
class NoiseSampling(Populations):
    """Draw from p(x0) exp(r(x0) / temperature) with `particles` Markov chains a pair in noise space.

    jumps: from noise to data. warm_up: moves in which the step size of a pair's chains is led to its best acceptance
    rate, from `step`; then `iterations` moves at the last step size. The chains' last states are returned. tempered:
    the reward's strength rises from 0 to 1 over the warm-up, and the chains are weighted for each rise and resampled
    where the weights are too uneven (Del Moral, Doucet, Jasra 2006, "Sequential Monte Carlo samplers"): consistent as
    particles grow, however short the chains, and every mode gets its share. Without it chains are independent and
    consistent as they get longer, but each may stay in the mode that it began in. kernel: "pcnl" needs a
    differentiable reward, "pcn" none. A budget bounds the moves; one that ends the warm-up early weighs what is left.
    """

    particles: int = 16
    jumps: int = 1
    warm_up: int = 16
    iterations: int = 16
    temperature: float = 0.1
    kernel: Kernel = "pcnl"
    step: float = 0.5
    tempered: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(particles=self.particles, jumps=self.jumps, iterations=self.iterations)
        check_temperature(self.temperature)
        if self.warm_up < self.tempered:
            raise ConfigError(f"warm_up must be at least 1, or 0 with tempered=false; got {self.warm_up}.")
        if self.kernel not in get_args(Kernel):
            raise ConfigError(f"kernel is 'pcnl' or 'pcn', got '{self.kernel}'.")
        if not 0 < self.step <= LONGEST:
            raise ConfigError(f"step must lie in (0, {LONGEST:g}], got {self.step}.")

    @property
    def needs_gradient(self) -> bool:
        return self.kernel == "pcnl"

    def steer(self, run: Run) -> Outcome:
        """Move the chains."""
        population = self.start(run, self.particles)
        strength = self._strength(0)
        h = torch.full_like(population.log_evidence, self.step)
        x0, r, gradient = self._judge(run, population.x)
        for i in run.rounds(self.warm_up + self.iterations):
            rise, strength = self._strength(i + 1) - strength, self._strength(i + 1)
            population.weigh(rise * r)
            x0, r, gradient = population.resample(run.seeds, i + 1, x0, r, gradient)
            z, each = population.x, h.repeat_interleave(len(r) // len(h))
            moved = proposal(z, strength * gradient, run.noise(self.particles, "step", i), each)
            there, r_there, gradient_there = self._judge(run, moved)
            change = log_acceptance(
                z, moved, strength * r, strength * r_there, strength * gradient, strength * gradient_there, each
            )
            taken = run.uniform(self.particles, i + 1).log() < change
            population.x, x0, r, gradient = (
                torch.where(unsqueeze_like(taken, old), new, old)
                for old, new in ((z, moved), (x0, there), (r, r_there), (gradient, gradient_there))
            )
            rate = population.everyone(change.clamp_max(0).exp().reshape(len(h), -1)).mean(1)
            if i < self.warm_up:
                h = (h * (rate - ACCEPTANCE[self.kernel]).exp()).clamp_max(LONGEST)
            run.record(reward=population.mean(r * self.temperature), acceptance=rate, step=h)
            run.record(effective_sample_size=population.effective_sample_size, look_ahead=population.heaviest(x0))
        population.weigh((1 - strength) * r)
        population.x = x0
        outcome = population.outcome(run.seeds)
        return outcome if self.tempered else outcome._replace(log_evidence=None)

    def _strength(self, moves: int) -> float:
        """Return the share of the reward that the chains see in a move, the first being number 1."""
        return moves / self.warm_up if self.tempered and moves < self.warm_up else 1.0

    def _judge(self, run: Run, z: State) -> tuple[State, Values, State]:
        """Return x0, phi (B * P,) in float64, and its gradient, zero where none is needed."""

        def carry(z: State, condition: Condition | None) -> State:
            return few_jumps(run.flow_map, z, self.jumps, condition)

        if self.needs_gradient:
            x0, values, gradient = run.reward_gradient(z, carry)
            return x0, values.double() / self.temperature, gradient / self.temperature
        x0 = run.rows(carry, z)
        return x0, run.rewards(x0).double() / self.temperature, torch.zeros_like(z)


def proposal(z: State, g: State, noise: State, h: Values) -> State:
    """Return z' of the module's text; g, noise (B, *dim), h (B,)."""
    h = unsqueeze_like(h, z).to(z)
    return ((2 - h) * z + 2 * h * g + (8 * h).sqrt() * noise) / (2 + h)


def log_acceptance(a: State, b: State, phi_a: Values, phi_b: Values, g_a: State, g_b: State, h: Values) -> Values:
    """Return the logarithm of the Metropolis ratio of a move from a to b, (B,), in float64.

    rho(a, b) - rho(b, a) with rho(a, b) = -phi(a) - (b - a) . g(a) / 2 - h (a + b) . g(a) / 4 + h |g(a)|^2 / 4; in
    float64, since temperatures make phi large. Reference: Cotter et al. 2013, arXiv 1202.0709 (pCNL).
    """
    a, b, g_a, g_b = (x.double().flatten(1) for x in (a, b, g_a, g_b))

    def rho(a: State, b: State, phi: Values, g: State) -> Values:
        return -phi - (((b - a) / 2 + h[:, None] / 4 * (a + b - g)) * g).sum(1)

    return rho(a, b, phi_a, g_a) - rho(b, a, phi_b, g_b)
