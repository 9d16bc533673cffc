"""The Lagrangian rule: where a jump ends moves with the velocity there, d/dt F(x, s, t) = v(F(x, s, t), t)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from steerfm.derivatives import Method, check_derivative, directional_derivative
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives.teachers import Teacher, held, teaching
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values, unsqueeze_like

Stop = Literal["velocity", "target", "nothing"]


def lagrangian(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    s: Times,
    t: Times,
    condition: Condition | None = None,
    *,
    teacher: FlowMap | None = None,
    stop: Stop = "velocity",
    derivative: Method = "forward",
    step: float = 1e-2,
) -> Values:
    """Return the squared gap between the speed of the jump's end and the velocity there; shape (B,).

    stop = "velocity"   d/dt F(x_s, s, t)  against  sg v(F, t)
    stop = "nothing"    d/dt F(x_s, s, t)  against  v(F, t), whose gradient reaches F
    stop = "target"     u(x_s, s, t)       against  sg[v(F, t) - (t - s) d/dt u]

    v is the teacher's velocity, or the map's own, u(x, t, t); no gradient reaches its weights. The three have one
    residual and other gradients.

    Reference: Boffi et al. 2024, arXiv 2406.07507 (LMD: teacher, nothing); Boffi et al. 2025, arXiv 2505.18825 (LSD:
    own, velocity); Sabour et al. 2025, arXiv 2506.14603 (AYF-LMD: teacher, target); Zhou et al. 2025, arXiv 2511.19797
    (TVM: an average of the own weights, velocity); Tee et al. 2024, arXiv 2411.08378 (PID: teacher, velocity, s = 1).
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    source = flow_map if teacher is None else teacher
    if stop == "target":

        def u(time: Times) -> State:
            return flow_map.average_velocity(x_s, s, time, condition)

        value, du_dt = directional_derivative(
            u, (t,), (torch.ones_like(t),), method=derivative, step=step, network=flow_map.network
        )
        interval = unsqueeze_like(t - s, x_s)
        with torch.no_grad():
            target = source.velocity(x_s + interval * value, t, condition) - interval * du_dt
        return mean_square(value - target)

    def end(time: Times) -> State:
        return flow_map.jump(x_s, s, time, condition)

    F, dF_dt = directional_derivative(
        end, (t,), (torch.ones_like(t),), method=derivative, step=step, network=flow_map.network
    )
    with held(source), torch.set_grad_enabled(stop == "nothing" and torch.is_grad_enabled()):
        target = source.velocity(F, t, condition)
    return mean_square(dF_dt - target)


@dataclass(frozen=True)
class Lagrangian:
    """Lagrangian self-distillation (LSD), and with a teacher LMD, AYF-LMD, PID and TVM (SelfAverage).

    derivative: "forward", or "central" with `step`. teacher: whose velocity the map learns from; None is its own.
    stop: what takes no gradient, see `lagrangian`: "velocity", "target" or "nothing" (with a teacher only: a map that
    may move its own target moves it to where it is easily met).
    """

    derivative: Method = "forward"
    step: float = 1e-2
    teacher: Teacher | None = field(default=None, kw_only=True)
    stop: Stop = field(default="velocity", kw_only=True)

    def __post_init__(self) -> None:
        check_derivative(self.derivative, self.step)
        if self.stop not in ("velocity", "target", "nothing"):
            raise ConfigError(f"stop is 'velocity', 'target' or 'nothing', got '{self.stop}'.")
        if self.stop == "nothing" and not isinstance(self.teacher, FlowMap):
            raise ConfigError("stop='nothing' needs a teacher of its own: the map's velocity must be stopped.")

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
        return lagrangian(
            flow_map, x0, x1, s, t, condition,
            teacher=teaching(self.teacher, flow_map), stop=self.stop, derivative=self.derivative, step=self.step,
        )  # fmt: skip
