"""The compositional rule: one jump equals the same jump made in two, F(F(x, s, r), r, t) = F(x, s, t)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives.teachers import Teacher, teaching
from steerfm.objectives.weights import mean_square
from steerfm.seeds import drawn
from steerfm.types import Condition, State, Times, Values, unsqueeze_like


def compositional(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    s: Times,
    t: Times,
    gamma: Times,
    condition: Condition | None = None,
    *,
    teacher: FlowMap | None = None,
    euler_below: float = 0.0,
) -> Values:
    """Return the squared gap between one jump and the same jump made in two; shape (B,).

    u(x_s, s, t)  against  sg[gamma u(x_s, s, r) + (1 - gamma) u(x_r, r, t)],  r = s + gamma (t - s).

    teacher: who makes the two jumps; None is the map itself. euler_below: of jumps shorter than this each half is an
    Euler step, u(x_s, s, s) in place of u(x_s, s, r): where a ladder of ever longer jumps begins.

    Reference: Boffi et al. 2025, arXiv 2505.18825 (progressive self-distillation, PSD); Guo et al. 2025, arXiv
    2507.16884 (SplitMeanFlow: any gamma, and a teacher on the diagonal); gamma = 1/2 on dyadic steps: Frans et al.
    2024, arXiv 2410.12557 (shortcut models), and with a teacher Salimans and Ho 2022, arXiv 2202.00512 (progressive
    distillation); Boffi et al. 2024, arXiv 2406.07507 (PFMM: a teacher that jumps less far).
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    r = torch.lerp(s, t, gamma)
    source = teacher or flow_map
    short = (t - s).abs() < euler_below
    with torch.no_grad():
        u_sr = source.average_velocity(x_s, s, torch.where(short, s, r), condition)
        x_r = x_s + unsqueeze_like(r - s, x_s) * u_sr
        u_rt = source.average_velocity(x_r, r, torch.where(short, r, t), condition)
        target = torch.lerp(u_rt, u_sr, unsqueeze_like(gamma, x_s))
    return mean_square(flow_map.average_velocity(x_s, s, t, condition) - target)


@dataclass(frozen=True)
class Compositional:
    """Progressive self-distillation (PSD); SplitMeanFlow, shortcut, PFMM and progressive distillation by its options.

    gamma: "uniform" on [0, 1], or "midpoint", always 1/2. teacher, euler_below: see `compositional`.
    """

    gamma: Literal["uniform", "midpoint"] = "midpoint"
    teacher: Teacher | None = field(default=None, kw_only=True)
    euler_below: float = field(default=0.0, kw_only=True)

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
        step: int = 0,
    ) -> Values:
        if self.gamma == "midpoint":
            gamma = torch.full_like(s, 0.5)
        else:
            gamma = drawn(torch.rand, s.shape, generator).to(s)
        return compositional(
            flow_map, x0, x1, s, t, gamma, condition,
            teacher=teaching(self.teacher, flow_map), euler_below=self.euler_below,
        )  # fmt: skip
