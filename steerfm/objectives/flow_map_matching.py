"""Flow map matching: there and back again, and at the end of the way back the speed is that of the data path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.derivatives import Method, check_derivative, directional_derivative
from steerfm.flow_map import FlowMap
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values


def flow_map_matching(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    s: Times,
    t: Times,
    condition: Condition | None = None,
    *,
    derivative: Method = "forward",
    step: float = 1e-2,
) -> Values:
    """Return |d/dq F(y, t, q) at q = s - w|^2 + |F(y, t, s) - x_s|^2 with y = F(x_s, s, t); shape (B,).

    w = alpha' x0 + sigma' x1 is the tangent of the data path at x_s, and y is held in the derivative (not in the
    gradient). Nothing is stopped and no velocity is learnt beside it, so that both terms have to be met: the map
    learns in both directions, on a law of times with `both=True`. On the exact map the second term is zero, and the
    first keeps the conditional variance of w. Only short intervals are learnt well.

    Reference: Boffi et al. 2024, arXiv 2406.07507 (flow map matching, FMM).
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    y = flow_map.jump(x_s, s, t, condition)
    back, speed = directional_derivative(
        lambda q: flow_map.jump(y, t, q, condition), (s,), (torch.ones_like(s),),
        method=derivative, step=step, network=flow_map.network,
    )  # fmt: skip
    return mean_square(speed - flow_map.path.tangent(x0, x1, s)) + mean_square(back - x_s)


@dataclass(frozen=True)
class FlowMapMatching:
    """Flow map matching (FMM), see `flow_map_matching`; derivative: "forward", or "central" with `step`."""

    derivative: Method = "forward"
    step: float = 1e-2

    def __post_init__(self) -> None:
        check_derivative(self.derivative, self.step)

    def __call__(
        self,
        flow_map: FlowMap,
        x0: State,
        x1: State,
        s: Times,
        t: Times,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Values:
        return flow_map_matching(flow_map, x0, x1, s, t, condition, derivative=self.derivative, step=self.step)
