"""The Eulerian rule: starting later on the same path ends at the same place, d/ds F + grad F . v(x, s) = 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.derivatives import Method, check_derivative, directional_derivative
from steerfm.flow_map import FlowMap
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values, unsqueeze_like


def mean_flow(
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
    """Return the squared gap of the MeanFlow identity, with the sample's tangent for the velocity; shape (B,).

    u(x_s, s, t)  against  sg[w + (t - s) (d/ds u + grad u . w)],  w = alpha' x0 + sigma' x1

    One directional derivative with tangent (w, 1, 0). On the exact map the mean residual at fixed x_s is zero,
    since the target is linear in w; the loss keeps the conditional variance of w.
    Reference: Geng et al. 2025, arXiv 2505.13447, eq. (9) and (10), there with time from target to source.
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    w = flow_map.path.tangent(x0, x1, s)

    def u(x: State, source: Times) -> State:
        return flow_map.average_velocity(x, source, t, condition)

    value, du = directional_derivative(
        u, (x_s, s), (w, torch.ones_like(s)), method=derivative, step=step, network=flow_map.network
    )
    target = w + unsqueeze_like(t - s, w) * du
    return mean_square(value - target.detach())


@dataclass(frozen=True)
class MeanFlow:
    """MeanFlow. derivative: "forward", or "central" with `step`."""

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
    ) -> Values:
        return mean_flow(flow_map, x0, x1, s, t, condition, derivative=self.derivative, step=self.step)
