"""Flow matching: the velocity on the diagonal s = t, from which every self-taught rule starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.flow_map import FlowMap
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values


def flow_matching(flow_map: FlowMap, x0: State, x1: State, t: Times, condition: Condition | None = None) -> Values:
    """Return the squared gap between the velocity and the path's tangent, |u(x_t, t, t) - w|^2; shape (B,).

    w = alpha' x0 + sigma' x1 (linear path: x1 - x0). On the exact map its mean is the conditional variance of
    w, and its mean gradient is zero. Reference: Lipman et al. 2022, arXiv 2210.02747, eq. (9).
    """
    x_t = flow_map.path.interpolate(x0, x1, t)
    return mean_square(flow_map.average_velocity(x_t, t, t, condition) - flow_map.path.tangent(x0, x1, t))


@dataclass(frozen=True)
class FlowMatching:
    """Learn the velocity only; jumps are then Euler steps. The baseline of the other objectives."""

    def __call__(
        self,
        flow_map: FlowMap,
        x0: State,
        x1: State,
        s: Times,
        t: Times,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
    ) -> Values:
        return flow_matching(flow_map, x0, x1, s, condition)
