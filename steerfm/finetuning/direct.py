"""Direct back-propagation: maximise the reward of what few jumps return, minus a penalty on how far it moved.

maximise over theta   E[ r(x0) ] - temperature * E[ penalty ]

The penalty is named, since it decides what the optimum is:

noise   |shift|^2 / 2, the shift in noise space that makes the reference return the same x0. Exact for a linear
        reward on a Gaussian (shift = c a / temperature for F(z) = m + c z and r = a . x); too narrow otherwise.
path    Girsanov's KL along the memoryless SDE, whose optimum is the tilt p(x0) exp(r / temperature).
sample  |x0 - x0_ref|^2 / 2, against what the reference returns from the same noise. An anchor and no divergence:
        cheap, for every map and number of jumps; the temperature is nominal, a strength in the same units.

References: Clark et al. 2023, arXiv 2309.17400 (DRaFT-K, and DRaFT-LV: `renoised`); Prabhudesai et al. 2023, arXiv
2310.03739 (AlignProp: `last="random"`); Domingo-Enrich et al. 2024, arXiv 2409.08861 (memoryless noise).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steerfm.divergence import girsanov, memoryless, noise_shift, squared_norm
from steerfm.errors import ConfigError
from steerfm.finetuning.common import Batch, FineTuning, Moves, Tuned, by_row, kept
from steerfm.flow_map import FlowMap, as_times
from steerfm.sampling import few_jumps, reverse_drift, sde_step
from steerfm.times import time_grid
from steerfm.types import Condition, State, Values

Penalty = Literal["noise", "path", "sample"]


@dataclass(frozen=True)
class DirectBackprop(FineTuning):
    """Back-propagate the reward through the last `last` of `jumps` jumps from noise.

    jumps: steps of the memoryless SDE for penalty "path" (8 or so: fewer are coarse), or jumps of the sampler for
    "noise" and "sample" (1 to 4). last: how many of them take gradients; all by default (fewer saves memory and is
    biased), "random" draws their number anew every step, the same for all rows. penalty: "path", "noise" or "sample",
    see the module's text; "noise" needs a map trained in both directions. renoised: with last=1, so many further
    samples whose last jump starts from x0 noised back, for a gradient of less variance. checkpointing: keep only the
    states between jumps and work out the rest again, so that memory hardly grows with jumps. Needs a differentiable
    reward.
    """

    needs_gradient: ClassVar[bool] = True

    jumps: int = 8
    last: int | Literal["random"] | None = None
    penalty: Penalty = "path"
    renoised: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.penalty not in ("noise", "path", "sample"):
            raise ConfigError(f"penalty is 'noise', 'path' or 'sample', got '{self.penalty}'.")
        if self.jumps < 1 or (isinstance(self.last, int) and not 1 <= self.last <= self.jumps):
            raise ConfigError(f"last must lie between 1 and jumps, got last={self.last} and jumps={self.jumps}.")
        if isinstance(self.last, str) and self.last != "random":
            raise ConfigError(f"last is a number of jumps, 'random' or none, got '{self.last}'.")
        if self.renoised < 0 or (self.renoised and (self.last != 1 or self.penalty == "path")):
            raise ConfigError(
                f"renoised samples repeat the last jump alone: they need last=1 and penalty 'noise' or 'sample', got "
                f"renoised={self.renoised}, last={self.last} and penalty='{self.penalty}'."
            )

    @property
    def moves(self) -> Moves:
        return "velocity" if self.penalty == "path" else "jumps"

    def __call__(self, batch: Batch) -> Tuned:
        """Return the loss -r(x0) + temperature * penalty, with the figure "penalty"."""
        first = self.jumps - self._with_gradient(batch)
        x1 = batch.normal()
        if self.penalty == "path":
            x0, penalty = sde_with_divergence(batch, x1, self.jumps, first, self.checkpointing)
        else:
            x0, x0_reference = self._jumped(batch, x1, first)
            penalty = shift_penalty(self.penalty, batch, x0, x0_reference, self.jumps)
        scores = batch.scores(x0)
        repeats = 1 + self.renoised
        loss = by_row(-scores.total + batch.temperature * penalty, repeats)
        parts = {name: by_row(part, repeats) for name, part in scores.parts.items()}
        return Tuned(loss, x0, by_row(scores.total, repeats), parts, {"penalty": by_row(penalty, repeats)})

    def _jumped(self, batch: Batch, x1: State, first: int) -> tuple[State, State]:
        """Return samples of the map and of the reference, each followed by its re-noised ones."""
        x = few_jumps_truncated(batch.flow_map, x1, self.jumps, first, batch.condition, self.checkpointing)
        with torch.no_grad():
            x_reference = few_jumps(batch.reference, x1, self.jumps, batch.condition)
        if not self.renoised:
            return x, x_reference
        s = time_grid(self.jumps)[-2]
        again, condition = batch.flow_map.path.interpolate, batch.times(self.renoised)
        times, noise = as_times(s, x1).repeat_interleave(self.renoised), batch.normal(self.renoised)
        x_s = again(x.detach().repeat_interleave(self.renoised, 0), noise, times)
        more = batch.flow_map.look_ahead(x_s, s, condition)
        with torch.no_grad():
            more_reference = batch.reference.look_ahead(x_s, s, condition)
        return _with_more(x, more, self.renoised), _with_more(x_reference, more_reference, self.renoised)

    def _with_gradient(self, batch: Batch) -> int:
        if self.last == "random":
            return 1 + int(self.jumps * batch.draws.common()[0])
        return self.jumps if self.last is None else self.last


def shift_penalty(penalty: Penalty, batch: Batch, x0: State, x0_reference: State, jumps: int) -> Values:
    """Return half the squared distance of x0 from the reference's, in the sample or in noise space; (B,)."""
    if penalty == "sample":
        return squared_norm(x0 - x0_reference) / 2
    condition = batch.times(len(x0) // len(batch.prompts))
    return squared_norm(noise_shift(batch.reference, x0, x0_reference, jumps, condition)) / 2


def few_jumps_truncated(
    flow_map: FlowMap, x1: State, jumps: int, first: int, condition: Condition | None, checkpointing: bool = False
) -> State:
    """Return x0 by equal jumps, of which those before number `first` take no gradient."""
    x, jump = x1, kept(flow_map.jump, checkpointing)
    for i, (s, t) in enumerate(itertools.pairwise(time_grid(jumps))):
        with torch.set_grad_enabled(i >= first):
            x = jump(x, s, t, condition)
    return x


def sde_with_divergence(
    batch: Batch, x1: State, steps: int, first: int, checkpointing: bool = False
) -> tuple[State, Values]:
    """Return x0 by the memoryless SDE and the KL of its path from the reference's, (B,).

    Steps before number `first` take no gradient. The last step's noise counts in the KL but is not added to
    x0, as samplers do.
    """

    def step(x: State, s: float, t: float, noise: State) -> tuple[State, Values]:
        times = as_times(s, x)
        g2, eta = memoryless(batch.flow_map, times, s - t)
        v = batch.flow_map.velocity(x, times, batch.condition)
        v_reference = batch.reference.velocity(x, times, batch.condition)
        taken = sde_step(x, reverse_drift(batch.flow_map.path, x, v, times, g2), g2, s - t, noise)
        return taken.x_next if t > 0 else taken.mean, girsanov(v, v_reference, g2, eta, s - t)

    x, divergence, step = x1, x1.new_zeros(len(x1)), kept(step, checkpointing)
    for i, (s, t) in enumerate(itertools.pairwise(time_grid(steps))):
        with torch.set_grad_enabled(i >= first):
            x, share = step(x, s, t, batch.normal())
            divergence = divergence + share
    return x, divergence


def _with_more(x: Tensor, more: Tensor, count: int) -> Tensor:
    """Return each row followed by its `count` rows of `more`."""
    return torch.cat([x[:, None], more.reshape(len(x), count, *x.shape[1:])], 1).flatten(0, 1)
