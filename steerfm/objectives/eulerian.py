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
    warmth: float = 1.0,
    normalise: float | None = None,
    derivative: Method = "forward",
    step: float = 1e-2,
) -> Values:
    """Return the squared gap of the Eulerian identity; shape (B,).

    stop = "target"     u(x_s, s, t)             against  sg[v + warmth (t - s) (d/ds u + grad u . d)]
    stop = "spatial"    d/ds F(x_s, s, t)        against  -sg[grad F . v]
    stop = "nothing"    d/ds F + grad F . v      against  0

    velocity: v is the sample's own tangent w = alpha' x0 + sigma' x1, the map's velocity u(x_s, s, s) or the
    teacher's, always stopped. along: d is v, or the map's own velocity (for "target"). With w the mean residual at
    a fixed x_s is zero on the exact map if the target is stopped and linear in w; the loss keeps w's conditional
    variance. warmth in [0, 1] and normalise, for "target": the gap g = u - target becomes g / (|g| + normalise), |g|
    over all dimensions, so that no sample pulls harder than another.

    Reference: Geng et al. 2025, arXiv 2505.13447, eq. (9) and (10), there with time from target to source (MeanFlow:
    tangent, target); Geng et al. 2025, arXiv 2512.02012 (improved MeanFlow: tangent, along self); Boffi et al. 2025,
    arXiv 2505.18825 (ESD: self, spatial; or nothing); Boffi et al. 2024, arXiv 2406.07507 (EMD: teacher, nothing);
    Sabour et al. 2025, arXiv 2506.14603 (AYF-EMD: teacher, target); Lu and Song 2024, arXiv 2410.11081, section 4
    (sCM: t = 0 only; tangent warm-up and normalisation, which keep it stable).
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    v = source_velocity(flow_map, x0, x1, x_s, s, condition, velocity, teacher)
    options = {"method": derivative, "step": step, "network": flow_map.network}
    ones = torch.ones_like(s)
    if stop == "spatial":
        _, dF_ds = directional_derivative(lambda at: flow_map.jump(x_s, at, t, condition), (s,), (ones,), **options)
        _, dF_dx = directional_derivative(lambda x: flow_map.jump(x, s, t, condition), (x_s,), (v,), **options)
        return mean_square(dF_ds + dF_dx.detach())
    d = v if along == "velocity" else source_velocity(flow_map, x0, x1, x_s, s, condition, "self", None)
    u, du = directional_derivative(
        lambda x, at: flow_map.average_velocity(x, at, t, condition), (x_s, s), (d, ones), **options
    )
    gap = u - v - warmth * unsqueeze_like(t - s, v) * du
    if stop == "nothing":
        return mean_square(gap)
    gap = gap.detach()
    if normalise is not None:
        gap = gap / (unsqueeze_like(gap.flatten(1).norm(dim=1), gap) + normalise)
    return mean_square(u - (u.detach() - gap))


def source_velocity(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    x_s: State,
    s: Times,
    condition: Condition | None,
    velocity: Velocity,
    teacher: FlowMap | None,
) -> State:
    """Return the velocity at x_s, stopped: the sample's tangent w, the map's own or the teacher's."""
    if velocity == "tangent":
        return flow_map.path.tangent(x0, x1, s)
    with torch.no_grad():
        return (teacher or flow_map).velocity(x_s, s, condition)


def check_velocity(velocity: str, teacher: FlowMap | None) -> None:
    """Raise ConfigError for a velocity that does not exist, or a teacher without a use."""
    known = ("tangent", "self", "teacher")
    if velocity not in known:
        raise ConfigError(f"velocity is one of {', '.join(known)}; got '{velocity}'.")
    if (velocity == "teacher") != (teacher is not None):
        raise ConfigError("velocity='teacher' and a teacher go together: give both or neither.")


@dataclass(frozen=True)
class Eulerian:
    """MeanFlow by default; improved MeanFlow, ESD, EMD, AYF-EMD, FACM and sCM by its options, see `eulerian`.

    derivative: "forward", or "central" with `step`. velocity: "tangent", "self", or "teacher" with a `teacher`.
    warm_up: training steps over which `warmth` grows from 0 to 1.
    """

    derivative: Method = "forward"
    step: float = 1e-2
    velocity: Velocity = field(default="tangent", kw_only=True)
    along: Along = field(default="velocity", kw_only=True)
    teacher: FlowMap | None = field(default=None, kw_only=True)
    stop: Stop = field(default="target", kw_only=True)
    warm_up: int = field(default=0, kw_only=True)
    normalise: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_derivative(self.derivative, self.step)
        check_velocity(self.velocity, self.teacher)
        for name, known in (("along", ("velocity", "self")), ("stop", ("target", "spatial", "nothing"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is one of {', '.join(known)}; got '{getattr(self, name)}'.")
        if self.velocity == "tangent" and self.stop != "target":
            raise ConfigError(
                f"stop='{self.stop}' needs the velocity of a map: w is noisy, and only a mean of it is v."
            )
        if self.along == "self" and self.stop != "target":
            raise ConfigError(f"along='self' is for stop='target', got stop='{self.stop}'.")
        if (self.warm_up or self.normalise is not None) and self.stop != "target":
            raise ConfigError(f"warm_up and normalise are for stop='target', got stop='{self.stop}'.")
        if self.warm_up < 0 or (self.normalise is not None and self.normalise <= 0):
            raise ConfigError(
                f"warm_up is 0 steps or more and normalise above 0: got {self.warm_up} and {self.normalise}."
            )

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
        return eulerian(
            flow_map, x0, x1, s, t, condition,
            velocity=self.velocity, along=self.along, teacher=self.teacher, stop=self.stop,
            warmth=min(step / self.warm_up, 1.0) if self.warm_up else 1.0, normalise=self.normalise,
            derivative=self.derivative, step=self.step,
        )  # fmt: skip
