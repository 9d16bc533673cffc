"""Flow matching: the velocity on the diagonal s = t, from which every self-taught rule starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.conditions.guidance import SCALE
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives.teachers import Teacher, teaching
from steerfm.objectives.weights import mean_square
from steerfm.solvers import heun
from steerfm.types import Condition, State, Times, Values, unsqueeze_like


def flow_matching(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    t: Times,
    condition: Condition | None = None,
    guidance: Values | float = 1.0,
) -> Values:
    """Return the squared gap between the velocity and the path's tangent, |u(x_t, t, t) - w|^2; shape (B,).

    w = alpha' x0 + sigma' x1 (linear path: x1 - x0). On the exact map its mean is the conditional variance of
    w, and its mean gradient is zero. Reference: Lipman et al. 2022, arXiv 2210.02747, eq. (9).

    guidance: the scale g of classifier-free guidance to learn; where it is not 1, w + (1 - 1/g) sg[u - u_null] takes
    w's place. Solved for u, that is u = v_null + g (v - v_null), the guided velocity at the cost of one more call, with
    u_null = v_null learnt from rows whose condition is the null one (the gap is 0 there). One number, or one a row,
    (B,); scales in the condition come first, and a network that reads them learns them all. Reference: Tang et al.
    2025, arXiv 2502.12154 (model guidance); Geng et al. 2025, arXiv 2505.13447, eq. (19).
    """
    x_t = flow_map.path.interpolate(x0, x1, t)
    u = flow_map.average_velocity(x_t, t, t, condition)
    target = flow_map.path.tangent(x0, x1, t)
    scale = guidance if condition is None else condition.tensors.get(SCALE, guidance)
    if condition is not None and (isinstance(scale, torch.Tensor) or scale != 1.0):
        with torch.no_grad():
            null = flow_map.conditioner.null(len(x_t)).to(x_t.device)  # type: ignore[union-attr,operator]
            share = unsqueeze_like(1 - 1 / torch.as_tensor(scale).to(x_t), x_t)
            target = target + share * (u - flow_map.average_velocity(x_t, t, t, null))
    return mean_square(u - target)


@dataclass(frozen=True)
class FlowMatching:
    """Learn the velocity only; jumps are then Euler steps. The baseline of the other objectives.

    teacher: a flow map or a velocity network in one, whose velocity is learnt in place of the data's (distillation);
    guided where it is guided.
    """

    teacher: Teacher | None = None

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
        if self.teacher is None:
            return flow_matching(flow_map, x0, x1, s, condition)
        x_s = flow_map.path.interpolate(x0, x1, s)
        with torch.no_grad():
            v = teaching(self.teacher, flow_map).velocity(x_s, s, condition)
        return mean_square(flow_map.velocity(x_s, s, condition) - v)


@dataclass(frozen=True)
class Reflow:
    """Learn the velocity between noise and where the teacher's own ODE leads it: a rectified, straighter flow.

    The data are not used. teacher: any map with a velocity. steps: of Heun's rule from t = 1 to 0, two calls each.
    Reference: Liu et al. 2022, arXiv 2209.03003, algorithm 1 (the 2-rectified flow).
    """

    teacher: FlowMap
    steps: int = 16

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"An ODE needs at least 1 step, got {self.steps}.")

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
        with torch.no_grad():
            ends = heun(self.teacher, x1, self.steps, condition)
        return flow_matching(flow_map, ends, x1, s, condition)
