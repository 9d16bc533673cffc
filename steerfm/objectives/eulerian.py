"""The Eulerian rule: starting later on the same path ends at the same place, d/ds F + grad F . v(x, s) = 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from steerfm.derivatives import Method, check_derivative, directional_derivative
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values, unsqueeze_like

Velocity = Literal["tangent", "self", "teacher"]
Along = Literal["velocity", "self"]
Stop = Literal["target", "spatial", "nothing"]


def eulerian(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    s: Times,
    t: Times,
    condition: Condition | None = None,
    *,
    velocity: Velocity = "tangent",
    along: Along = "velocity",
    teacher: FlowMap | None = None,
    stop: Stop = "target",
    derivative: Method = "forward",
    step: float = 1e-2,
) -> Values:
    """Return the squared gap of the Eulerian identity; shape (B,).

    stop = "target"     u(x_s, s, t)             against  sg[v + (t - s) (d/ds u + grad u . d)]
    stop = "spatial"    d/ds F(x_s, s, t)        against  -sg[grad F . v]
    stop = "nothing"    d/ds F + grad F . v      against  0

    velocity: v is the sample's own tangent w = alpha' x0 + sigma' x1, the map's velocity u(x_s, s, s) or the
    teacher's, always stopped. along: d is v, or the map's own velocity (for "target"). With w the mean residual at
    a fixed x_s is zero on the exact map if the target is stopped and linear in w; the loss keeps w's conditional
    variance.

    Reference: Geng et al. 2025, arXiv 2505.13447, eq. (9) and (10), there with time from target to source (MeanFlow:
    tangent, target); Geng et al. 2025, arXiv 2512.02012 (improved MeanFlow: tangent, along self); Boffi et al. 2025,
    arXiv 2505.18825 (ESD: self, spatial); Boffi et al. 2024, arXiv 2406.07507 (EMD: teacher, nothing); Sabour et al.
    2025, arXiv 2506.14603 (AYF-EMD: teacher, target).
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    v = _velocity(flow_map, x0, x1, x_s, s, condition, velocity, teacher)
    options = {"method": derivative, "step": step, "network": flow_map.network}
    ones = torch.ones_like(s)
    if stop == "spatial":
        _, dF_ds = directional_derivative(lambda at: flow_map.jump(x_s, at, t, condition), (s,), (ones,), **options)
        _, dF_dx = directional_derivative(lambda x: flow_map.jump(x, s, t, condition), (x_s,), (v,), **options)
        return mean_square(dF_ds + dF_dx.detach())
    d = v if along == "velocity" else _velocity(flow_map, x0, x1, x_s, s, condition, "self", None)
    u, du = directional_derivative(
        lambda x, at: flow_map.average_velocity(x, at, t, condition), (x_s, s), (d, ones), **options
    )
    target = v + unsqueeze_like(t - s, v) * du
    return mean_square(u - (target if stop == "nothing" else target.detach()))


def _velocity(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    x_s: State,
    s: Times,
    condition: Condition | None,
    velocity: Velocity,
    teacher: FlowMap | None,
) -> State:
    if velocity == "tangent":
        return flow_map.path.tangent(x0, x1, s)
    with torch.no_grad():
        return (teacher or flow_map).velocity(x_s, s, condition)


@dataclass(frozen=True)
class Eulerian:
    """MeanFlow by default; improved MeanFlow, ESD, EMD and AYF-EMD by its options, see `eulerian`.

    derivative: "forward", or "central" with `step`. velocity: "tangent", "self", or "teacher" with a `teacher`.
    """

    derivative: Method = "forward"
    step: float = 1e-2
    velocity: Velocity = field(default="tangent", kw_only=True)
    along: Along = field(default="velocity", kw_only=True)
    teacher: FlowMap | None = field(default=None, kw_only=True)
    stop: Stop = field(default="target", kw_only=True)

    def __post_init__(self) -> None:
        check_derivative(self.derivative, self.step)
        for name, known in (
            ("velocity", ("tangent", "self", "teacher")),
            ("along", ("velocity", "self")),
            ("stop", ("target", "spatial", "nothing")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is one of {', '.join(known)}; got '{getattr(self, name)}'.")
        if (self.velocity == "teacher") != (self.teacher is not None):
            raise ConfigError("velocity='teacher' and a teacher go together: give both or neither.")
        if self.velocity == "tangent" and self.stop != "target":
            raise ConfigError(
                f"stop='{self.stop}' needs the velocity of a map: w is noisy, and only a mean of it is v."
            )
        if self.along == "self" and self.stop != "target":
            raise ConfigError(f"along='self' is for stop='target', got stop='{self.stop}'.")

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
        return eulerian(
            flow_map, x0, x1, s, t, condition,
            velocity=self.velocity, along=self.along, teacher=self.teacher, stop=self.stop,
            derivative=self.derivative, step=self.step,
        )  # fmt: skip
