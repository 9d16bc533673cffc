"""Flow matching: the velocity on the diagonal s = t, from which every self-taught rule starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerfm.flow_map import FlowMap
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values


def flow_matching(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    t: Times,
    condition: Condition | None = None,
    guidance: float = 1.0,
) -> Values:
    """Return the squared gap between the velocity and the path's tangent, |u(x_t, t, t) - w|^2; shape (B,).

    w = alpha' x0 + sigma' x1 (linear path: x1 - x0). On the exact map its mean is the conditional variance of
    w, and its mean gradient is zero. Reference: Lipman et al. 2022, arXiv 2210.02747, eq. (9).

    guidance: the scale g of classifier-free guidance to learn; where it is not 1, w + (1 - 1/g) sg[u - u_null] takes
    w's place. Solved for u, that is u = v_null + g (v - v_null), the guided velocity at the cost of one more call, with
    u_null = v_null learnt from rows whose condition is the null one (the gap is 0 there). Reference: Tang et al.
    2025, arXiv 2502.12154 (model guidance); Geng et al. 2025, arXiv 2505.13447, eq. (19).
    """
    x_t = flow_map.path.interpolate(x0, x1, t)
    u = flow_map.average_velocity(x_t, t, t, condition)
    target = flow_map.path.tangent(x0, x1, t)
    if guidance != 1.0 and condition is not None:
        with torch.no_grad():
            null = flow_map.conditioner.null(len(x_t)).to(x_t.device)  # type: ignore[union-attr,operator]
            target = target + (1 - 1 / guidance) * (u - flow_map.average_velocity(x_t, t, t, null))
    return mean_square(u - target)


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
