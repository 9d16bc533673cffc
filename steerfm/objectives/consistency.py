"""The Eulerian rule over a finite step: two starts on one path end at the same place. No derivative is taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.objectives.eulerian import Velocity, check_velocity, source_velocity
from steerfm.objectives.teachers import SelfAverage, held, teaching
from steerfm.objectives.weights import mean_square
from steerfm.types import Condition, State, Times, Values, unsqueeze_like

Compare = Literal["target", "data"]


def consistency(
    flow_map: FlowMap,
    x0: State,
    x1: State,
    s: Times,
    t: Times,
    share: Times,
    condition: Condition | None = None,
    *,
    velocity: Velocity = "tangent",
    teacher: FlowMap | None = None,
    target: FlowMap | None = None,
    compare: Compare = "target",
) -> Values:
    """Return the squared gap between a jump and the same jump begun a step later on the path; shape (B,).

    r = s + share (t - s),  x_r = x_s + (r - s) v,  share in (0, 1]
    compare = "target"   1/share |u(x_s, s, t) - sg[share v + (1 - share) u(x_r, r, t)]|^2
    compare = "data"     1/share |F_sg(F(x_s, s, t), t, 0) - sg F(F(x_r, r, t), t, 0)|^2

    The first is |F(x_s, s, t) - sg F(x_r, r, t)|^2 / ((s - r)(s - t)): with t = 0 the loss of consistency models,
    whose weight 1/(s - r) keeps its gradient finite as the step shrinks; that gradient is then the Eulerian rule's
    (MeanFlow's with the tangent, AYF-EMD's with a teacher). velocity: as in `eulerian`; on the linear path x_r of
    "tangent" is the sample's own point at r. The velocity, and the later jump, are stopped; target: the map that makes
    the later jump, an average of the map's weights for example; None is the map itself. F_sg passes gradients to where
    it starts, not to its weights.

    Reference: Song et al. 2023, arXiv 2303.01469, algorithms 2 and 3 (CD: teacher; CT: tangent); Kim et al. 2023,
    arXiv 2310.02279, eq. (5) (CTM: teacher, compared at data); Luo et al. 2025, arXiv 2512.15657 (SoFlow).
    """
    x_s = flow_map.path.interpolate(x0, x1, s)
    v = source_velocity(flow_map, x0, x1, x_s, s, condition, velocity, teacher)
    r, rho = torch.lerp(s, t, share), unsqueeze_like(share, x_s)
    later = target or flow_map
    u = flow_map.average_velocity(x_s, s, t, condition)
    with torch.no_grad():
        u_r = later.average_velocity(x_s + unsqueeze_like(r - s, x_s) * v, r, t, condition)
        u_target = rho * v + (1 - rho) * u_r
    if compare == "target":
        return mean_square(u - u_target) / share
    interval = unsqueeze_like(t - s, x_s)
    with held(later):
        reached = later.look_ahead(x_s + interval * u, t, condition)
    with torch.no_grad():
        wanted = later.look_ahead(x_s + interval * u_target, t, condition)
    return mean_square(reached - wanted) / share


@dataclass(frozen=True)
class Shrinking:
    """A step that shrinks from `first` to `last` over `steps` training steps, by equal factors; then it stays.

    halving: in jumps by 1/2 rather than smoothly, at equally long intervals of training.
    Reference: Song and Dhariwal 2023, arXiv 2310.14189, section 3.4 (iCT, halving).
    """

    first: float
    last: float
    steps: int
    halving: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.last <= self.first <= 1 or self.steps < 1:
            raise ConfigError(
                f"A step shrinks from first to last in (0, 1], over at least 1 training step: got {self.first}, "
                f"{self.last} and {self.steps}."
            )

    def __call__(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        if not self.halving:
            return self.first * (self.last / self.first) ** done
        size, halvings = self.first, 0
        while size / 2 >= self.last * (1 - 1e-9):
            size, halvings = size / 2, halvings + 1
        return self.first / 2 ** min(int(done * (halvings + 1)), halvings)


@dataclass(frozen=True)
class Consistency:
    """Consistency training (CT); consistency distillation, CTM, SoFlow, iCT and ECT by its options, see `consistency`.

    step: the step, a number or a schedule of the training step such as Shrinking. relative: whether it is a share of
    the interval s - t, or a time (cut off at the interval). teacher: whose velocity makes the step, with velocity =
    "teacher". average: a SelfAverage of the map to make the later jump. t = 0 comes from the time law,
    `Anchored(..., end=1.0)`.
    """

    step: float | Shrinking = 0.05
    relative: bool = False
    velocity: Velocity = field(default="tangent", kw_only=True)
    teacher: FlowMap | None = field(default=None, kw_only=True)
    average: SelfAverage | None = field(default=None, kw_only=True)
    compare: Compare = field(default="target", kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.step, (int, float)) and not 0 < self.step <= 1:
            raise ConfigError(f"The step of consistency training must lie in (0, 1], got {self.step}.")
        if self.compare not in ("target", "data"):
            raise ConfigError(f"compare is 'target' or 'data', got '{self.compare}'.")
        check_velocity(self.velocity, self.teacher)

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
        size = self.step if isinstance(self.step, (int, float)) else self.step(step)
        share = torch.full_like(s, size)
        if not self.relative:
            share = (share / (s - t).abs().clamp_min(1e-6)).clamp_max(1.0)
        return consistency(
            flow_map, x0, x1, s, t, share, condition,
            velocity=self.velocity, teacher=self.teacher, compare=self.compare,
            target=None if self.average is None else teaching(self.average, flow_map),
        )  # fmt: skip
