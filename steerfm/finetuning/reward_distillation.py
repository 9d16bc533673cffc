"""Distillation with a reward (RG-LCM): learn to jump from a teacher, and toward a reward, in one run.

L = T * objective(x_s, s, t) + share * (-r(F(x_s, s, 0)))

objective: any of steerfm.objectives, with a teacher or without, on clean data x0 of the batch (or the base's own
samples, where it holds none). The reward is that of look-aheads from the same noisy states, so that a velocity teacher
becomes a few-jump, reward-aware map at once. The objective anchors the map, and its scale is not that of a divergence:
the temperature is nominal. The reward pulls at jumps to t = 0 itself, which most laws of times never meet: half of the
default's end there, so that the objective holds them.
Reference: Li et al. 2024, arXiv 2403.11027 (reward guided latent consistency distillation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Moves, Tuned
from steerfm.flow_map import declared
from steerfm.objectives import Compositional, FlowMatching
from steerfm.sampling import few_jumps
from steerfm.seeds import rows_between, shares
from steerfm.times import Anchored, TimeLaw, Triangle
from steerfm.types import Condition, State, Values


@dataclass(frozen=True)
class RewardDistillation(FineTuning):
    """Learn `objective` and, from the same noisy states, the reward of look-aheads; needs a differentiable reward.

    diagonal: an objective for the rows on the diagonal of `times`; flow matching by default, FlowMatching(teacher) to
    learn from a teacher alone. share: the weight of the reward beside T times the objective. jumps: of the reference,
    for data of its own, where the batch holds no "x0".
    """

    needs_gradient: ClassVar[bool] = True

    objective: Callable[..., Values] = field(default_factory=Compositional)
    diagonal: Callable[..., Values] | None = None
    times: TimeLaw = field(default_factory=lambda: Anchored(Triangle(0.5), end=0.5))
    share: float = 1.0
    jumps: int = 4

    def __post_init__(self) -> None:
        if not self.share >= 0:
            raise ConfigError(f"share weighs the reward and is 0 or more, got {self.share}.")

    @property
    def moves(self) -> Moves:
        return "jumps"

    def __call__(self, batch: Batch) -> Tuned:
        flow_map, condition, generator = batch.flow_map, batch.condition, batch.generator
        if declared(flow_map.network, "velocity_only", False):
            raise ConfigError(
                "RewardDistillation teaches jumps, and a network of one time alone cannot learn them: begin with "
                "steerfm.backbones.two_times(flow_map)."
            )
        x0, x1 = self._clean(batch), batch.normal()
        shared = shares(len(x0), generator)
        s, t = (each[shared.rows].to(x0) for each in self.times(shared.total, shared.generator, batch.step))
        first = self.times.diagonal_rows(shared.total)
        rows, losses = shared.before(first), []
        on, off = (slice(rows), 0, first), (slice(rows, None), first, shared.total)
        for (some, start, end), rule in ((on, self.diagonal or FlowMatching()), (off, self.objective)):
            if len(x0[some]):
                own: Condition | None = None if condition is None else condition.select(some)
                inputs = (flow_map, x0[some], x1[some], s[some], t[some], own)
                with rows_between(generator, start, end):
                    losses.append(rule(*inputs, generator, batch.step))
        loss = batch.temperature * torch.cat(losses)
        ahead = flow_map.look_ahead(flow_map.path.interpolate(x0, x1, s), s, condition)
        scores = batch.scores(ahead)
        figures = {"objective": torch.cat(losses).detach()}
        return Tuned(loss - self.share * scores.total, None, scores.total.detach(), scores.parts, figures)

    def _clean(self, batch: Batch) -> State:
        if "x0" in batch.data:
            return batch.data["x0"].to(batch.flow_map.device, batch.flow_map.dtype)
        with torch.no_grad():
            return few_jumps(batch.reference, batch.normal(), self.jumps, batch.condition)
