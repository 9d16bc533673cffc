"""Sequential Monte Carlo: trajectories of a base sampler, weighed on the way by what they promise.

With log-potentials V_t(x) = lambda_t r(clean(x, t)) / temperature the weight of a step is a factor G, and whatever
the factors were, the last one makes their product exp(r(x0) / temperature): the target is the base sampler, as it
runs, tilted by the reward. A step may be proposed elsewhere than by the base kernel N(m, std^2); the ratio of the
two densities then is part of its weight.

difference  log G_t = V_t(x_t) - V_s(x_s)
max         log G_t = the largest V so far
sum         log G_t = the sum of all V so far

References: Singhal et al. 2025, arXiv 2501.06848 (Feynman-Kac steering: these three); Wu et al. 2023, arXiv 2306.17775
(twisted proposals); Kim et al. 2025, arXiv 2501.05803 (lambda tempered geometrically); Zhou, Johansen, Aston
2016, arXiv 1303.3123 (adaptively, by the conditional effective sample size).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from steerfm.errors import ConfigError
from steerfm.flow_map import as_times
from steerfm.sampling import Noise, squared_noise
from steerfm.solvers import check_share, noising, shares
from steerfm.steering.common import Outcome, Run, check_counts, check_temperature
from steerfm.steering.populations import Population, Populations
from steerfm.times import time_grid
from steerfm.types import Condition, State, Values, unsqueeze_like

Clean = Literal["look_ahead", "posterior_mean"]
Potential = Literal["difference", "max", "sum"]
Kernel = Literal["renoised", "sde"]
Strength = Literal["path", "constant", "geometric", "adaptive"]
OPTIONS = {"clean": Clean, "potential": Potential, "kernel": Kernel, "strength": Strength, "noise": Noise}
HALVINGS = 40  # of the interval in which an adaptive strength is sought


@dataclass(frozen=True)
class SequentialMonteCarlo(Populations):
    """Draw from the base sampler tilted by exp(r / temperature) with a weighted population a pair; no gradient needed.

    particles: trajectories a pair. steps: of the base sampler. clean: what stands for x0 on the way, "look_ahead" or
    "posterior_mean". potential: see the module's text. strength: lambda at step i, "path" alpha(t), "constant" 1,
    "geometric" 2^(i / steps) - 1, or "adaptive": for each population the largest up to alpha(t) whose step's
    conditional effective sample size is `keep` of the particles, and none smaller than before. kernel: "renoised", a
    jump past the next time to (1 - gamma) t and fresh noise, whose marginals are exact for any number of steps if the
    map is (with gamma 1 and the look-ahead one network call a step); or "sde", steps of the reverse-time SDE with
    `noise`. twisted: propose around m + std^2 grad V, which needs a gradient. every: steps from one potential to the
    next.

    Consistent as particles grow, for the base sampler as it runs, its guidance_scale included.
    """

    particles: int = 16
    steps: int = 16
    temperature: float = 0.1
    clean: Clean = "look_ahead"
    potential: Potential = "difference"
    strength: Strength = "path"
    keep: float = 0.95
    kernel: Kernel = "renoised"
    gamma: float = 1.0
    noise: Noise = "gentle"
    twisted: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(particles=self.particles, steps=self.steps, every=self.every)
        check_temperature(self.temperature)
        check_share("gamma", self.gamma)
        for name, kind in OPTIONS.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(f"'{option}'" for option in get_args(kind))
                raise ConfigError(f"{name} is one of {known}; got '{getattr(self, name)}'.")
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep is a share of the effective sample size, in (0, 1); got {self.keep}.")
        if self.strength == "adaptive" and self.potential != "difference":
            raise ConfigError("An adaptive strength goes with potential='difference'; max and sum count V repeatedly.")
        if self.twisted and self.every != 1:
            raise ConfigError(f"A twisted proposal needs V at every step: every=1, got {self.every}.")
        if self.kernel == "renoised" and self.gamma == 0:
            raise ConfigError("gamma=0 adds no noise, and copies of a particle would stay together: raise it.")

    @property
    def needs_gradient(self) -> bool:
        return self.twisted

    def steer(self, run: Run) -> Outcome:
        """Carry the population from noise to data."""
        population = self.start(run, self.particles)
        total = population.log_weights.flatten()  # the logarithm of all factors so far
        tracked = torch.full_like(total, -torch.inf) if self.potential == "max" else total  # of all V so far
        strength = torch.zeros_like(population.log_evidence)
        for i, s, t in run.steps(time_grid(self.steps)):
            clean, push = None, None
            if t == 0:
                population.x = run.look_ahead(population.x, s)
                values = run.rewards(population.x)
                population.weigh(values.double() / self.temperature - total)
                _record(run, population, values, population.x)
            elif i % self.every == 0:
                clean, values, push = self._judge(run, population.x, s)
                scaled = values.double() / self.temperature
                strength = self._strength(run, population, scaled, total, strength, i, s)
                each = strength.repeat_interleave(len(total) // len(strength))
                factor, tracked = self._factor(each * scaled, total, tracked)
                total = total + factor
                population.weigh(factor)
                push = unsqueeze_like(each / self.temperature, push).to(push) * push
                _record(run, population, values, clean)
                clean, push, total, tracked = population.resample(run.seeds, i, clean, push, total, tracked)
            if t > 0:
                population.x, log_ratio = self._propose(run, population.x, clean, push, s, t, i)
                population.weigh(log_ratio)
        return population.outcome(run.seeds)

    def _judge(self, run: Run, x: State, s: float) -> tuple[State, Values, State]:
        """Return what stands for x0, its reward (B * P,) and the reward's gradient, zero where none is needed."""

        def predict(x: State, condition: Condition | None) -> State:
            clean = run.flow_map.look_ahead if self.clean == "look_ahead" else run.flow_map.denoise
            return clean(x, s, condition)

        if self.twisted:
            return run.reward_gradient(x, predict)
        clean = run.rows(predict, x)
        return clean, run.rewards(clean), torch.zeros_like(x)

    def _strength(
        self, run: Run, population: Population, scaled: Values, total: Values, before: Values, i: int, s: float
    ) -> Values:
        """Return lambda of each pair at step i, (B,); scaled: r / temperature, (B * P,)."""
        if self.strength != "adaptive":
            value = {"path": shares(run.flow_map.path, s)[0], "constant": 1.0, "geometric": 2 ** (i / self.steps) - 1}[
                self.strength
            ]
            return torch.full_like(before, value)

        shape = population.log_weights.shape
        weights = population.all_log_weights.log_softmax(1)

        def share(strength: Values) -> Values:
            """Return what the conditional effective sample size is of all particles."""
            factor = population.everyone(strength[:, None] * scaled.reshape(shape) - total.reshape(shape))
            return (2 * (weights + factor).logsumexp(1) - (weights + 2 * factor).logsumexp(1)).exp()

        highest = torch.full_like(before, shares(run.flow_map.path, s)[0]).maximum(before)
        low, high = before, highest
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = share(middle) >= self.keep
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return torch.where(share(highest) >= self.keep, highest, low)

    def _factor(self, V: Values, total: Values, tracked: Values) -> tuple[Values, Values]:
        """Return log G and what is tracked of V, each (B * P,)."""
        if self.potential == "difference":
            return V - total, tracked
        tracked = torch.maximum(tracked, V) if self.potential == "max" else tracked + V
        return tracked, tracked

    def _propose(
        self, run: Run, x: State, clean: State | None, push: State | None, s: float, t: float, step: int
    ) -> tuple[State, Values]:
        """Return states at t and the logarithm of base density over proposal's, (B * P,)."""
        mean, std = self._base(run, x, clean, s, t)
        z = run.noise(self.particles, "step", step)
        if push is None or not self.twisted:
            return mean + std * z, z.new_zeros(len(z), dtype=torch.float64)
        # N(x; m, std^2) / N(x; m + std^2 push, std^2) at x = m + std^2 push + std z
        shift, z64 = (std * push).double().flatten(1), z.double().flatten(1)
        return mean + std**2 * push + std * z, -((shift * z64).sum(1) + shift.square().sum(1) / 2)

    def _base(self, run: Run, x: State, clean: State | None, s: float, t: float) -> tuple[State, float]:
        """Return mean and standard deviation of the base kernel from s to t."""
        path = run.flow_map.path
        if self.kernel == "sde":
            times = as_times(s, x)
            g2 = squared_noise(path, times, s - t, self.noise)
            drift = unsqueeze_like(g2 / 2, x) * path.score(x, run.velocity(x, s), times)
            return run.jump(x, s, t) + (s - t) * drift, math.sqrt(float(g2[0]) * (s - t))
        r = (1 - self.gamma) * t
        ahead = clean if clean is not None and r == 0 and self.clean == "look_ahead" else run.jump(x, s, r)
        kept, std = noising(path, r, t)
        return kept * ahead, std


def _record(run: Run, population: Population, values: Values, clean: State) -> None:
    run.record(reward=population.mean(values), effective_sample_size=population.effective_sample_size)
    run.record(look_ahead=population.heaviest(clean))
