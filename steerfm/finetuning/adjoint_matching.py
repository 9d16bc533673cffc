"""Adjoint matching: regress the drift of the memoryless SDE on how the reward answers to each of its states.

Trajectories x_0 = x1, x_{k+1} = x_k + h b_theta(x_k) + g_k sqrt(h) noise of the map that is tuned, without a gradient;
then, backward and along the base's drift alone,

    a_K = -grad r(x_K) / T,    a_k = a_{k+1} + h (d b_ref / dx (x_k))^T a_{k+1}
    L = sum over k of h |(b_theta - b_ref)(x_k) / g_k + g_k a_{k+1}|^2

Its optimum is the drift b_ref - g^2 E[a | x] = b_ref + g^2 grad V, whose end is the tilt p(x0) exp(r / T) because the
noise is memoryless. b = -v + g^2/2 score, so that b_theta - b_ref = -(1 + g^2 / (2 eta)) (v_theta - v_ref): twice the
gap at small steps. a_{k+1} and not a_k: the control of a step acts on where it ends, and with it the optimum of a
linear reward on a Gaussian is the exact tilt of the base as these steps sample it.
Reference: Domingo-Enrich et al. 2024, arXiv 2409.08861, section 5 (the lean adjoint).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from steerfm.divergence import memoryless
from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Tuned, kept
from steerfm.flow_map import FlowMap, as_times
from steerfm.objectives.weights import mean_square
from steerfm.reward import Scores
from steerfm.sampling import reverse_drift, sde_step
from steerfm.steering.common import check_counts
from steerfm.times import time_grid
from steerfm.types import Condition, State, unsqueeze_like


@dataclass(frozen=True)
class AdjointMatching(FineTuning):
    """Match the lean adjoint along `sde_steps` steps; needs a differentiable reward.

    matched: how many of the steps, drawn anew for every batch, are regressed on, which saves their backward passes; all
    by default. checkpointing: work each of them out again in the backward pass, so that memory does not grow with
    their number. Exact as the steps grow; the temperature is that of the tilt.
    """

    needs_gradient: ClassVar[bool] = True

    sde_steps: int = 16
    matched: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_counts(sde_steps=self.sde_steps, **({} if self.matched is None else {"matched": self.matched}))
        if self.matched is not None and self.matched > self.sde_steps:
            raise ConfigError(f"matched counts among the steps: at most {self.sde_steps}, got {self.matched}.")

    def __call__(self, batch: Batch) -> Tuned:
        walk = memoryless_walk(batch, self.sde_steps)
        scores, adjoint = end_adjoint(batch, walk[-1].after)
        condition, reference = batch.condition, batch.reference
        loss, chosen = torch.zeros_like(scores.total), self._chosen(batch)
        velocity = kept(batch.flow_map.velocity, self.checkpointing)
        for k in reversed(range(self.sde_steps)):
            each = walk[k]
            if k in chosen:
                g2, eta = memoryless(batch.flow_map, as_times(each.t, each.x), each.h)
                with torch.no_grad():
                    v_reference = reference.velocity(each.x, each.t, condition)
                factor = unsqueeze_like(1 + g2 / (2 * eta), each.x)
                g = unsqueeze_like(g2.sqrt(), each.x)
                control = -factor * (velocity(each.x, each.t, condition) - v_reference) / g
                loss = loss + each.h * mean_square(control + g * adjoint) * self.sde_steps / len(chosen)
            if k:
                adjoint = adjoint_before(reference, each, adjoint, condition)
        return Tuned(loss, walk[-1].after, scores.total, scores.parts)

    def _chosen(self, batch: Batch) -> set[int]:
        """Return the steps that are regressed on, the same for all rows and on all processes."""
        if self.matched is None:
            return set(range(self.sde_steps))
        keys = batch.draws.common(self.sde_steps)
        return set(sorted(range(self.sde_steps), key=lambda k: keys[k])[: self.matched])


class Walked(NamedTuple):
    """One step of a walk: from state x at time t, over h of time, to the state after."""

    x: State
    t: float
    h: float
    after: State


@torch.no_grad()
def memoryless_walk(batch: Batch, steps: int) -> list[Walked]:
    """Return a trajectory of the map that is tuned, from noise to data; the last step adds no noise."""
    walk, x, path = list[Walked](), batch.normal(), batch.flow_map.path
    for s, t in itertools.pairwise(time_grid(steps)):
        times = as_times(s, x)
        g2, _ = memoryless(batch.flow_map, times, s - t)
        drift = reverse_drift(path, x, batch.flow_map.velocity(x, times, batch.condition), times, g2)
        taken = sde_step(x, drift, g2, s - t, batch.normal())
        walk.append(Walked(x, s, s - t, taken.x_next if t > 0 else taken.mean))
        x = walk[-1].after
    return walk


def end_adjoint(batch: Batch, x0: State) -> tuple[Scores, State]:
    """Return the rewards of x0 and -grad r(x0) / T."""
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_(True)
        scores = batch.scores(x0)
        (gradient,) = torch.autograd.grad(scores.total.sum(), x0)
    parts = {name: part.detach() for name, part in scores.parts.items()}
    return Scores(scores.total.detach(), parts), -gradient / batch.temperature


def adjoint_before(reference: FlowMap, step: Walked, adjoint: State, condition: Condition | None) -> State:
    """Return the adjoint before a step from that after it: the transposed Jacobian of the base's mean of the step."""
    with torch.enable_grad():
        x = step.x.detach().requires_grad_(True)
        times = as_times(step.t, x)
        g2, _ = memoryless(reference, times, step.h)
        mean = x + step.h * reverse_drift(reference.path, x, reference.velocity(x, times, condition), times, g2)
        (before,) = torch.autograd.grad(mean, x, adjoint)
    return before
