"""Policy gradients (Flow-GRPO): sampling is a chain of Gaussian steps, and steps of good samples get likelier.

maximise  E[r(x0)] - T sum over k of KL(p_theta(x_{k+1} | x_k) | p_ref(x_{k+1} | x_k))

Steps are those of the reverse-time SDE, or jumps past the next time that are noised back to it, so that the policy is
the few-jump sampler itself. The advantage of step k is what follows it, r - T (KL of later steps), less the mean over
the other samples of the same prompt. The KL of a step, |difference of means|^2 / (2 std^2), is known exactly and is
back-propagated as it is. Both together are the whole gradient of the line above: with memoryless noise its optimum is
the tilt; with less noise the start is remembered, and the temperature is nominal. A KL in the loss alone, as Flow-GRPO
has it, forgets how a step decides what its successors cost. References: Liu et al. 2025, arXiv 2505.05470 (Flow-GRPO);
Schulman et al. 2017, arXiv 1707.06347 (the clipped ratio); Ahmadian et al. 2024, arXiv 2402.14740 (leave one out).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Moves, Tuned, compared, kept
from steerfm.flow_map import FlowMap, as_times
from steerfm.objectives.teachers import Rounds
from steerfm.sampling import gaussian_log_prob, reverse_drift
from steerfm.solvers import noising
from steerfm.steering.common import check_counts
from steerfm.times import time_grid
from steerfm.types import Condition, State, Values, unsqueeze_like

Noise = Literal["memoryless", "flow", "jumps"]


@dataclass(frozen=True)
class PolicyGradient(FineTuning):
    """Raise the likelihood of steps that led to more reward than the other samples of the same prompt; any reward.

    noise: "memoryless", or "flow", g = level sqrt(sigma d / alpha) as in Flow-GRPO (linear path: level sqrt(t / (1 -
    t))), of the SDE's steps; "jumps", of few jumps of the map. level: also the share of a jump that is noised back, in
    (0, 1]. clip: how far the ratio of likelihoods may leave 1. every: optimiser steps that sample from the same older
    map; 1 is on-policy. by_std: divide advantages by their group's standard deviation, which makes the temperature
    nominal, T times it. checkpointing: work every step out again in the backward pass, so that memory does not grow
    with their number. Needs two samples a prompt or more.
    """

    sde_steps: int = 8
    noise: Noise = "memoryless"
    level: float = 0.7
    clip: float = 0.2
    every: int = 1
    by_std: bool = False
    checkpointing: bool = False
    old: Rounds | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_counts(sde_steps=self.sde_steps, every=self.every)
        if self.noise not in ("memoryless", "flow", "jumps"):
            raise ConfigError(f"noise is 'memoryless', 'flow' or 'jumps', got '{self.noise}'.")
        if not 0 < self.level <= 1 or not self.clip > 0:
            raise ConfigError(f"level lies in (0, 1] and clip is positive, got {self.level} and {self.clip}.")
        if self.sde_steps < 2:
            raise ConfigError(
                "The last step adds no noise, so that one step has no policy: sde_steps must be 2 or more."
            )
        object.__setattr__(self, "old", Rounds(0, self.every) if self.every > 1 else None)

    @property
    def moves(self) -> Moves:
        return "jumps" if self.noise == "jumps" else "velocity"

    def __call__(self, batch: Batch) -> Tuned:
        walk, x0 = self._walk(batch, batch.flow_map if self.old is None else self.old.map)
        with torch.no_grad():
            scores = batch.scores(x0)
        policy_of = kept(self._policy, self.checkpointing)
        policies = [policy_of(batch.flow_map, each, batch.condition) for each in walk]
        divergences = []
        for policy, each in zip(policies, walk, strict=True):
            with torch.no_grad():
                reference = self._policy(batch.reference, each, batch.condition)
            divergences.append(gaussian_divergence(policy, reference, each.std))
        loss, later = torch.zeros_like(scores.total), torch.zeros_like(scores.total)
        for each, policy, divergence in reversed(list(zip(walk, policies, divergences, strict=True))):
            if float(each.std.max()) > 0:
                advantage = self._advantage(scores.total - batch.temperature * later, batch.prompts)
                ratio = (gaussian_log_prob(each.after, policy, each.std) - each.log_prob).exp()
                loss = loss - clipped(ratio, advantage, self.clip) + batch.temperature * divergence
                later = later + divergence.detach()
        return Tuned(loss, x0, scores.total, scores.parts, {"penalty": later})

    @torch.no_grad()
    def _walk(self, batch: Batch, flow_map: FlowMap) -> tuple[list[Taken], State]:
        """Return the steps of a trajectory, and where it ends."""
        walk, x = list[Taken](), batch.normal()
        for s, t in itertools.pairwise(time_grid(self.sde_steps)):
            std = self._std(flow_map, as_times(s, x), s, t)
            mean = self._policy(flow_map, Taken(x, s, t, x, std, std), batch.condition)
            after = mean + unsqueeze_like(std, x) * batch.normal()
            walk.append(Taken(x, s, t, after, std, gaussian_log_prob(after, mean, std)))
            x = after
        return walk, x

    def _std(self, flow_map: FlowMap, times: Tensor, s: float, t: float) -> Tensor:
        """Return the standard deviation of the step from s to t, (B,); 0 for the last."""
        if t == 0:
            return torch.zeros_like(times)
        if self.noise == "jumps":
            return torch.full_like(times, noising(flow_map.path, (1 - self.level) * t, t)[1])
        return (self._squared(flow_map, times, s - t) * (s - t)).sqrt()

    def _squared(self, flow_map: FlowMap, times: Tensor, h: float) -> Tensor:
        """Return g^2 of the SDE, (B,)."""
        memoryless = flow_map.path.memoryless_noise(times, h)  # 2 eta, which is finite with the step as offset
        return memoryless if self.noise == "memoryless" else self.level**2 * memoryless / 2

    def _policy(self, flow_map: FlowMap, step: Taken, condition: Condition | None) -> State:
        """Return the mean of the state after a step."""
        x, s, t = step.x, step.s, step.t
        if self.noise == "jumps":
            r = (1 - self.level) * t
            return (noising(flow_map.path, r, t)[0] if t > 0 else 1.0) * flow_map.jump(x, s, r, condition)
        times = as_times(s, x)
        g2 = self._squared(flow_map, times, s - t)
        return x + (s - t) * reverse_drift(flow_map.path, x, flow_map.velocity(x, times, condition), times, g2)

    def _advantage(self, values: Values, prompts: Sequence[str]) -> Values:
        """Return values less the mean of the others of the same prompt, (B,)."""
        group = compared(values, prompts)
        advantage = (values - group.mean) * group.size / (group.size - 1)
        return advantage / group.std.clamp_min(1e-6) if self.by_std else advantage


class Taken(NamedTuple):
    """One step that was taken: from x at s to `after` at t, its standard deviation and log-density, (B,)."""

    x: State
    s: float
    t: float
    after: State
    std: Tensor
    log_prob: Tensor


def clipped(ratio: Values, advantage: Values, clip: float) -> Values:
    """Return the lesser of ratio * advantage with the ratio as it is and within [1 - clip, 1 + clip]; (B,).

    Reference: Schulman et al. 2017, arXiv 1707.06347, eq. (7).
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def gaussian_divergence(mean: State, other: State, std: Tensor) -> Values:
    """Return KL(N(mean, std^2) | N(other, std^2)), (B,); 0 where std is 0."""
    squares = (mean - other).flatten(1).square().sum(1)
    return torch.where(std > 0, squares / (2 * torch.where(std > 0, std, 1.0) ** 2), torch.zeros_like(squares))
