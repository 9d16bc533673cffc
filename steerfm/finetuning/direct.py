"""Direct back-propagation: maximise the reward of what few jumps return, minus a penalty on how far it moved.

maximise over theta   E[ r(x0) ] - temperature * E[ penalty ]

The penalty is named, since it decides what the optimum is:

noise   |shift|^2 / 2, the shift in noise space that makes the reference return the same x0. Exact for a linear
        reward on a Gaussian (shift = c a / temperature for F(z) = m + c z and r = a . x); too narrow otherwise.
path    Girsanov's KL along the memoryless SDE, whose optimum is the tilt p(x0) exp(r / temperature).
sample  |x0 - x0_ref|^2 / 2, against what the reference returns from the same noise. An anchor and no divergence:
        cheap, for every map and number of jumps; the temperature is nominal, a strength in the same units.

References: Clark et al. 2023, arXiv 2309.17400 (DRaFT-K); Prabhudesai et al. 2023, arXiv 2310.03739 (AlignProp);
Domingo-Enrich et al. 2024, arXiv 2409.08861 (memoryless noise).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steerfm.divergence import girsanov, memoryless, noise_shift, squared_norm
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, as_times
from steerfm.reward import Reward
from steerfm.sampling import few_jumps, reverse_drift, sde_step
from steerfm.times import time_grid
from steerfm.types import Condition, State, Values


class Tuned(NamedTuple):
    """What one step of a fine-tuning method returns, per sample: loss, samples, reward, its parts, penalty."""

    loss: Values
    x0: State
    rewards: Values
    parts: dict[str, Tensor]
    penalty: Values


@dataclass(frozen=True)
class DirectBackprop:
    """Back-propagate the reward through the last `last` of `jumps` jumps from noise.

    jumps: steps of the memoryless SDE for penalty "path" (8 or so: fewer are coarse), or jumps of the sampler for
    "noise" and "sample" (1 to 4). last: how many of them take gradients; all by default (fewer saves memory and is
    biased). penalty: "path", "noise" or "sample", see the module's text; "noise" needs a map trained in both
    directions. Needs a differentiable reward.
    """

    jumps: int = 8
    last: int | None = None
    penalty: Literal["noise", "path", "sample"] = "path"

    def __post_init__(self) -> None:
        if self.penalty not in ("noise", "path", "sample"):
            raise ConfigError(f"penalty is 'noise', 'path' or 'sample', got '{self.penalty}'.")
        if self.jumps < 1 or not 1 <= self._with_gradient <= self.jumps:
            raise ConfigError(f"last must lie between 1 and jumps, got last={self.last} and jumps={self.jumps}.")

    def __call__(
        self,
        flow_map: FlowMap,
        reference: FlowMap,
        reward: Reward,
        x1: State,
        prompts: Sequence[str],
        condition: Condition | None,
        temperature: float,
        draw: Callable[[int], State],
    ) -> Tuned:
        """Return the loss -r(x0) + temperature * penalty and its parts; `draw(step)` gives the SDE's noise."""
        first = self.jumps - self._with_gradient
        if self.penalty == "path":
            x0, penalty = sde_with_divergence(flow_map, reference, x1, self.jumps, first, condition, draw)
        else:
            x0 = few_jumps_truncated(flow_map, x1, self.jumps, first, condition)
            with torch.no_grad():
                x0_reference = few_jumps(reference, x1, self.jumps, condition)
            if self.penalty == "noise":
                penalty = squared_norm(noise_shift(reference, x0, x0_reference, self.jumps, condition)) / 2
            else:
                penalty = squared_norm(x0 - x0_reference) / 2
        scores = reward(flow_map.decode(x0), prompts)
        loss = -scores.total + temperature * penalty
        return Tuned(loss, x0, scores.total, scores.parts, penalty)

    @property
    def _with_gradient(self) -> int:
        return self.jumps if self.last is None else self.last


def few_jumps_truncated(flow_map: FlowMap, x1: State, jumps: int, first: int, condition: Condition | None) -> State:
    """Return x0 by equal jumps, of which those before number `first` take no gradient."""
    x = x1
    grid = time_grid(jumps)
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        with torch.set_grad_enabled(i >= first):
            x = flow_map.jump(x, s, t, condition)
    return x


def sde_with_divergence(
    flow_map: FlowMap,
    reference: FlowMap,
    x1: State,
    steps: int,
    first: int,
    condition: Condition | None,
    draw: Callable[[int], State],
) -> tuple[State, Values]:
    """Return x0 by the memoryless SDE and the KL of its path from the reference's, (B,).

    Steps before number `first` take no gradient. The last step's noise counts in the KL but is not added to
    x0, as samplers do.
    """
    x, divergence = x1, torch.zeros(len(x1), dtype=x1.dtype, device=x1.device)
    grid = time_grid(steps)
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        with torch.set_grad_enabled(i >= first):
            times = as_times(s, x)
            g2, eta = memoryless(flow_map, times, s - t)
            v = flow_map.velocity(x, times, condition)
            v_reference = reference.velocity(x, times, condition)
            divergence = divergence + girsanov(v, v_reference, g2, eta, s - t)
            step = sde_step(x, reverse_drift(flow_map.path, x, v, times, g2), g2, s - t, draw(i))
            x = step.x_next if t > 0 else step.mean
    return x, divergence
