"""Best of n: draw n samples a seed, keep one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfm import seeds as seeding
from steerfm.distributed import effective_sample_size
from steerfm.flow_map import FlowMap
from steerfm.sampling import few_jumps, finish, measure, prepare
from steerfm.steering.common import check_counts, check_temperature, ready_reward
from steerfm.types import Condition, Samples


@dataclass(frozen=True)
class BestOfN:
    """Draw n candidates a seed in `jumps` jumps each, and keep the best, or one by softmax of r / temperature.

    temperature None: argmax, which has no tilt as its target. With a temperature, one candidate is drawn with
    weights exp(r / temperature): consistent for the tilted density as n grows (importance sampling from the
    prior). Needs no gradient of the reward.
    """

    n: int = 16
    jumps: int = 4
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_counts(n=self.n, jumps=self.jumps)
        check_temperature(self.temperature, allow_none=True)

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
        reward = ready_reward(reward, "BestOfN", needs_gradient=False)
        task = prepare(flow_map, prompts, seeds, condition, particles=self.n)
        with measure(flow_map, reward, len(task.seeds)) as cost:
            x0 = few_jumps(flow_map, task.x1, self.jumps, task.condition)
            each = [prompt for prompt in task.prompts for _ in range(self.n)]
            values = reward(flow_map.decode(x0), each).total.reshape(-1, self.n)
        log_weights, chosen = self._choose(values, task.seeds)
        particles = x0.reshape(-1, self.n, *x0.shape[1:])
        kept = particles[torch.arange(len(particles)), chosen]
        note = "" if self.temperature else "argmax selection: no temperature, its target is not a tilt"
        return finish(
            flow_map,
            task,
            kept,
            reward,
            cost(),
            log_weights=log_weights,
            effective_sample_size=effective_sample_size(log_weights),
            particles=particles,
            note=note,
        )

    def _choose(self, values: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Return normalised log-weights (B, n) and the candidate kept (B,)."""
        if self.temperature is None:
            chosen = values.argmax(1)
            one_hot = torch.nn.functional.one_hot(chosen, self.n).to(values)
            return one_hot.log(), chosen
        log_weights = (values / self.temperature).log_softmax(1)
        return log_weights, draw_by_weight(log_weights, seeds)


def draw_by_weight(log_weights: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return one particle a population, drawn by its weight with the seed's own number; (B, P) -> (B,) long."""
    edges = log_weights.double().softmax(1).cumsum(1)
    uniform = seeding.uniform(seeds, stream="select").to(edges)[:, None] * edges[:, -1:]
    return torch.searchsorted(edges, uniform, right=True).squeeze(1).clamp_max(log_weights.shape[1] - 1)
