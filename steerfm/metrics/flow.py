"""Is it still a flow map: do jumps agree with each other and with the ODE, and how straight is the flow.

None of these look at data: a flow map of the wrong distribution may pass them all. Distances are Euclidean in model
space and sum over its dimensions. They are means over noise, which has no bias: the standard error of B samples is
std / √B. `semigroup_defect` stands in steerfm.divergence, since fine-tuning watches it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from steerfm.divergence import semigroup_defect, squared_norm
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.sampling import few_jumps, heun
from steerfm.times import time_grid
from steerfm.types import Condition, State, Values

__all__ = ["EndpointAgreement", "endpoint_agreement", "semigroup_defect", "straightness"]


@dataclass(frozen=True)
class EndpointAgreement:
    """Hold how far jumps from noise land from where the fine ODE lands.

    gap: root mean square distance. relative: gap over the root mean square distance of two different endpoints of
    the ODE: 0 for an exact map, 0.71 for one that always returns the mean, 1 for one no nearer than another sample.
    floor: the same ratio between the ODE in `steps` and in half as many; a relative gap below it says nothing.
    """

    gap: float
    relative: float
    floor: float
    samples: int
    steps: int
    jumps: int


@torch.no_grad()
def endpoint_agreement(
    flow_map: FlowMap,
    x1: State,
    condition: Condition | None = None,
    *,
    jumps: int = 1,
    steps: int = 64,
    batch_size: int = 256,
) -> EndpointAgreement:
    """Compare `jumps` jumps from noise x1 (B, *dim), B of at least 2, with Heun's method in `steps` steps.

    The ODE follows the map's own velocity u(x, t, t), so this is the map's agreement with itself and not its
    quality; methods that fine-tune only the velocity break it. With a condition the spread is that over all rows.
    Unbiased in B but for the ratio's error of order 1/B. Costs about 3 steps + jumps network calls a sample.
    """
    if len(x1) < 2 or steps < 2:
        raise ConfigError(f"An endpoint agreement needs 2 samples and 2 steps or more, got {len(x1)} and {steps}.")
    jumped, fine, coarse = [], [], []
    for x, told in _batches(x1, condition, batch_size):
        jumped.append(few_jumps(flow_map, x, jumps, told))
        fine.append(heun(flow_map, x, steps, told))
        coarse.append(heun(flow_map, x, steps // 2, told))
    ends = torch.cat(fine).double()
    # the mean of |a - b|² over pairs of different rows is twice the summed variance
    spread = float((2 * ends.var(0).sum()).sqrt())
    gap, error = (_root_mean_square(torch.cat(each).double() - ends) for each in (jumped, coarse))
    relative, floor = (each / spread if spread > 0 else torch.inf for each in (gap, error))
    return EndpointAgreement(gap, relative, floor, len(x1), steps, jumps)


@torch.no_grad()
def straightness(
    flow_map: FlowMap, x1: State, steps: int = 64, condition: Condition | None = None, *, batch_size: int = 256
) -> Values:
    """Return ∫ |v(x_t, t) - (x1 - x0)|² dt along the ODE's own path from each row of x1 (B, *dim) to its x0; (B,).

    0 where one Euler step is exact; divide by the mean of |x1 - x0|² to compare data sets. Not the flow-matching
    loss, which puts the data's own pairs in place of the ODE's. By the midpoint rule, whose velocities sum to
    x1 - x0 exactly, so that this is their variance over time: never negative, off by O(1 / steps²), two network
    calls a step. Reference: Liu et al. 2022, arXiv 2209.03003, where it is S(Z).
    """
    found = [_straightness(flow_map, x, steps, told) for x, told in _batches(x1, condition, batch_size)]
    return torch.cat(found)


def _straightness(flow_map: FlowMap, x1: State, steps: int, condition: Condition | None) -> Values:
    x, mean, squares = x1, torch.zeros_like(x1), torch.zeros_like(x1)
    grid = time_grid(steps)
    for count, (s, t) in enumerate(itertools.pairwise(grid), start=1):
        middle = x + (t - s) / 2 * flow_map.velocity(x, s, condition)
        v = flow_map.velocity(middle, (s + t) / 2, condition)
        x = x + (t - s) * v
        before = v - mean  # Welford's update: no difference of large squares
        mean = mean + before / count
        squares = squares + before * (v - mean)
    return squares.flatten(1).sum(1) / steps


def _batches(x1: State, condition: Condition | None, size: int) -> Iterator[tuple[State, Condition | None]]:
    for start in range(0, len(x1), size):
        rows = slice(start, start + size)
        yield x1[rows], None if condition is None else condition.select(rows)


def _root_mean_square(gap: State) -> float:
    return float(squared_norm(gap).mean().sqrt())
