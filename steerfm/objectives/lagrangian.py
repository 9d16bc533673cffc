"""The Lagrangian rule: where a jump ends moves with the velocity there, d/dt F(x, s, t) = v(F(x, s, t), t)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.derivatives import Method, check_derivative, directional_derivative
from steerfm.flow_map import FlowMap
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values


def lagrangian(
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
    """Return the squared gap between the speed of the jump's end and the velocity there; shape (B,).

    d/dt F(x_s, s, t)  against  sg u(F, t, t)

    The map teaches itself: the target is its own diagonal, stopped. Gradients flow through the derivative.
    Reference: Boffi et al. 2025, arXiv 2505.18825 (Lagrangian self-distillation).
    """
    x_s = flow_map.path.interpolate(x0, x1, s)

    def end(time: Times) -> State:
        return flow_map.jump(x_s, s, time, condition)

    F, dF_dt = directional_derivative(
        end, (t,), (torch.ones_like(t),), method=derivative, step=step, network=flow_map.network
    )
    with torch.no_grad():
        target = flow_map.velocity(F.detach(), t, condition)
    return mean_square(dF_dt - target)


@dataclass(frozen=True)
class Lagrangian:
    """Lagrangian self-distillation (LSD). derivative: "forward", or "central" with `step`."""

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
        return lagrangian(flow_map, x0, x1, s, t, condition, derivative=self.derivative, step=self.step)
