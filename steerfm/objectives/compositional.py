"""The compositional rule: one jump equals the same jump made in two, F(F(x, s, r), r, t) = F(x, s, t)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values, unsqueeze_like


def compositional(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    s: Times,
    t: Times,
    gamma: Times,
    condition: Condition | None = None,
) -> Values:
    """Return the squared gap between one jump and the same jump made in two; shape (B,).

    u(x_s, s, t)  against  sg[gamma u(x_s, s, r) + (1 - gamma) u(x_r, r, t)],  r = s + gamma (t - s).

    Reference: Boffi et al. 2025, arXiv 2505.18825 (progressive self-distillation);
    gamma = 1/2 on dyadic steps is the shortcut model of Frans et al. 2024, arXiv 2410.12557.
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    r = torch.lerp(s, t, gamma)
    with torch.no_grad():
        u_sr = flow_map.average_velocity(x_s, s, r, condition)
        x_r = x_s + unsqueeze_like(r - s, x_s) * u_sr
        u_rt = flow_map.average_velocity(x_r, r, t, condition)
        target = torch.lerp(u_rt, u_sr, unsqueeze_like(gamma, x_s))
    return mean_square(flow_map.average_velocity(x_s, s, t, condition) - target)


@dataclass(frozen=True)
class Compositional:
    """Progressive self-distillation (PSD). gamma: "uniform" on [0, 1], or "midpoint", always 1/2."""

    gamma: Literal["uniform", "midpoint"] = "midpoint"

    def __post_init__(self) -> None:
        if self.gamma not in ("uniform", "midpoint"):
            raise ConfigError(f"gamma is 'uniform' or 'midpoint', got '{self.gamma}'.")

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
        if self.gamma == "midpoint":
            gamma = torch.full_like(s, 0.5)
        else:
            gamma = torch.rand(s.shape, generator=generator).to(s)
        return compositional(flow_map, x0, x1, s, t, gamma, condition)
