"""Flow-map trajectory tilting: a population of trajectories, pushed by the look-ahead's gradient and weighted.

Along the flow the look-ahead F(x, t, 0) does not change, so with potentials V_t(x) = alpha(t) r(F(x, t, 0))
only the factor alpha moves, and the log-weight of a trajectory is simply

    dA = r(F(x_t, t, 0)) d(alpha)        (linear path: r dtau)

whose total telescopes to r(x0): nothing is added at the end.

Reference: Sabour et al. 2025, arXiv 2511.22688.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfm import seeds as seeding
from steerfm.distributed import effective_sample_size, systematic_ancestors
from steerfm.flow_map import FlowMap, as_times
from steerfm.reward import Reward
from steerfm.sampling import Task, finish, measure, prepare, sde_step
from steerfm.steering.best_of_n import draw_by_weight
from steerfm.steering.common import check_counts, check_temperature, ready_reward, value_and_gradient
from steerfm.times import time_grid
from steerfm.types import Condition, Samples, State, unsqueeze_like


@dataclass(frozen=True)
class FlowMapTilting:
    """Draw from p(x0) exp(r(x0) / temperature) with a weighted population a seed.

    particles: trajectories a seed. jumps: steps; each is a jump of the map, the drift g^2/2 (score + grad V)
    and noise g^2 = 2 sigma d (linear: 2 t); the last is a jump alone, whose end is the sample. Weights are
    carried, and resampled systematically where the effective sample size falls below `resample_below` times
    the particles. Exact as jumps and particles grow, if the map is exact and guidance_scale is 1; with
    classifier-free guidance it is approximate. Needs a differentiable reward.

    Returned: one sample a seed drawn by weight, all particles, their normalised log-weights, the effective
    sample size, and as trace the log of the mean weight (the evidence) and the effective sample size by step.
    """

    particles: int = 16
    jumps: int = 32
    temperature: float = 0.1
    resample_below: float = 0.5

    def __post_init__(self) -> None:
        check_counts(particles=self.particles, jumps=self.jumps)
        check_temperature(self.temperature)

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        reward: Any = None,
        *,
        prompts: Sequence[str] = ("",),
        seeds: Sequence[int] = (0,),
        condition: Condition | None = None,
    ) -> Samples:
        reward = ready_reward(reward, "FlowMapTilting", needs_gradient=True)
        task = prepare(flow_map, prompts, seeds, condition, particles=self.particles)
        with measure(flow_map, reward, len(task.seeds)) as cost:
            population = self._run(flow_map, reward, task)
        particles = population.x.reshape(-1, self.particles, *task.x1.shape[1:])
        log_weights = population.log_weights.log_softmax(1)
        chosen = draw_by_weight(log_weights, task.seeds)
        kept = particles[torch.arange(len(particles)), chosen]
        told = getattr(flow_map.network, "guidance_input", False)  # such a map has learnt the guided flow
        guided = flow_map.guidance_scale != 1 and task.condition is not None and not told
        return finish(
            flow_map,
            task,
            kept,
            reward,
            cost(),
            log_weights=log_weights,
            effective_sample_size=effective_sample_size(log_weights),
            particles=particles,
            trace={
                "effective_sample_size": torch.stack(population.sizes, 1),
                "log_evidence": population.log_evidence + _log_mean_exp(population.log_weights),
            },
            note="approximate: the map's guidance_scale is not 1" if guided else "",
        )

    def _run(self, flow_map: FlowMap, reward: Reward, task: Task) -> _Population:
        """Carry the population from noise to data."""
        each = [prompt for prompt in task.prompts for _ in range(self.particles)]
        log_weights = task.x1.new_zeros(len(task.seeds), self.particles, dtype=torch.float64)
        population = _Population(task.x1, log_weights, [], log_weights.new_zeros(len(task.seeds)))
        grid = time_grid(self.jumps)
        for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
            x = population.x
            clean, values, gradient = value_and_gradient(
                lambda state, t=t: flow_map.look_ahead(state, t, task.condition), reward, flow_map.decode, x, each
            )
            # Where alpha(1) is not quite 0 the first weights hold V_1 too, or the total would miss its share of r.
            gain = _alpha(flow_map, t_next) - (_alpha(flow_map, t) if i else 0.0)
            scaled = values.double().reshape(log_weights.shape) / self.temperature
            population.log_weights = population.log_weights + gain * scaled
            last = i == self.jumps - 1
            population.x = clean if last else self._move(flow_map, task, x, gradient, t, t_next, i)
            population.sizes.append(effective_sample_size(population.log_weights))
            if not last:
                population.resample(self.resample_below, task.seeds, i)
        return population

    def _move(
        self, flow_map: FlowMap, task: Task, x: State, gradient: State, t: float, t_next: float, step: int
    ) -> State:
        """Jump from t to t_next, then add the step's drift g^2/2 (score + grad V) and its noise."""
        times = as_times(t, x)
        g2 = flow_map.path.gentle_noise(times)
        score = flow_map.score(x, times, task.condition)
        potential = unsqueeze_like(flow_map.path.alpha(times) / self.temperature, x) * gradient
        drift = unsqueeze_like(g2 / 2, x) * (score + potential)
        moved = flow_map.jump(x, t, t_next, task.condition)
        return sde_step(moved, drift, g2, t - t_next, task.step_noise(step)).x_next


@dataclass
class _Population:
    """The trajectories of all seeds: states (B * P, *dim), log-weights (B, P) since the last resampling."""

    x: State
    log_weights: Tensor
    sizes: list[Tensor]
    log_evidence: Tensor

    def resample(self, below: float, seeds: Sequence[int], step: int) -> None:
        """Resample the populations whose effective sample size is too small; their weights become equal."""
        count = self.log_weights.shape[1]
        small = self.sizes[-1] < below * count
        if not small.any():
            return
        uniform = seeding.uniform(seeds, stream="resample", step=step).to(self.log_weights)
        own = torch.arange(count, device=self.x.device).expand_as(self.log_weights)
        ancestors = torch.where(small[:, None], systematic_ancestors(self.log_weights, uniform), own)
        first = torch.arange(len(small), device=self.x.device)[:, None] * count
        self.x = self.x[(first + ancestors).flatten()]
        self.log_evidence = self.log_evidence + torch.where(small, _log_mean_exp(self.log_weights), 0.0)
        self.log_weights = torch.where(small[:, None], 0.0, self.log_weights)


def _alpha(flow_map: FlowMap, t: float) -> float:
    return float(flow_map.path.alpha(torch.tensor(t, dtype=torch.float64)))


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])
