"""What the fine-tuning methods share: what a step works with and returns, and how rows are re-noised and weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steerfm.distributed import GroupStatistics, effective_sample_size, gather, group_statistics
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.memory import in_micro_batches
from steerfm.reward import Reward, Scores
from steerfm.sampling import decoded, few_jumps
from steerfm.seeds import RowDraws
from steerfm.types import Condition, State, Times, Values

Moves = Literal["velocity", "jumps"]


@dataclass(frozen=True)
class Batch:
    """Hold what one step of a fine-tuning method works with: B prompts, one a row.

    flow_map is trained, reference is what it was, frozen. draws: the rows' random numbers; generator: torch's, of
    the same rows (`steerfm.seeds.drawn`). step: optimiser steps so far. micro_batch: pictures that are decoded and
    scored at once, whose activations are worked out again in the backward pass; all of them, kept, by default. halved:
    smaller micro-batches that steps have come down to where memory ran out, the last one in use. data: whatever else
    the batch holds, such as "x0". memory: what a method keeps from step to step, in no checkpoint, so that it has to
    follow from the seed, which is the run's.
    """

    flow_map: FlowMap
    reference: FlowMap
    reward: Reward
    prompts: Sequence[str]
    condition: Condition | None
    temperature: float
    draws: RowDraws
    generator: torch.Generator | None = None
    step: int = 0
    micro_batch: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    halved: list[int] = field(default_factory=list)
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)

    def normal(self, count: int = 1) -> State:
        """Return standard normal noise, (B * count, *dim); that of one row is neighbours."""
        return self.draws.normal(self.flow_map.data_shape, count).to(self.flow_map.device, self.flow_map.dtype)

    def uniform(self, count: int = 1) -> Times:
        """Return numbers in [0, 1), (B * count,)."""
        return self.draws.uniform(count).to(self.flow_map.device, self.flow_map.dtype)

    def times(self, count: int) -> Condition | None:
        """Return every row's condition `count` times, copies of one row next to each other."""
        return None if self.condition is None else self.condition.repeat_interleave(count)

    def scores(self, x0: State) -> Scores:
        """Return the rewards of clean states, (B * count, *dim), with their gradient."""
        count = len(x0) // len(self.prompts)
        prompts = [prompt for prompt in self.prompts for _ in range(count)]

        def score(start: int, stop: int) -> Scores:
            if stop - start == len(x0) and self.micro_batch is None:
                return self.reward(decoded(self.flow_map, x0), prompts)
            given = x0[start:stop], prompts[start:stop]
            return checkpoint(partial(_score, self), *given, use_reentrant=False)  # type: ignore[return-value]

        before = self.halved[-1] if self.halved else self.micro_batch
        found, size = in_micro_batches(score, len(x0), before, "scoring")
        if size is not None and size != before:
            self.halved.append(size)
        if len(found) == 1:
            return found[0]
        parts = {name: torch.cat([scores.parts[name] for scores in found]) for name in found[0].parts}
        return Scores(torch.cat([scores.total for scores in found]), parts)


def _score(batch: Batch, x0: State, prompts: Sequence[str]) -> Scores:
    return batch.reward(batch.flow_map.decode(x0), prompts)


@dataclass(frozen=True)
class Tuned:
    """What one step returns, one value a row: the loss; samples of the tuned map, if the method drew any.

    rewards and their parts are those of what was scored, samples of the map, of the reference or of the target.
    figures: whatever else is worth a line in the log, by name. target: draws of what the map is moved toward, if the
    method has any: the consistency then works at those, not at the map's own samples.
    """

    loss: Values
    x0: State | None = None
    rewards: Values | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Tensor] = field(default_factory=dict)
    target: State | None = None


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Move a flow map toward a reward: `method(batch)` returns the losses of one step, see `Batch` and `Tuned`.

    A module in a method's fields follows the map or is trained beside it, as those of an objective. needs_gradient:
    of the reward. needs_reward: whether there must be one at all.
    """

    needs_gradient: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = True

    @property
    def moves(self) -> Moves:
        """What is moved: "velocity", u(x, t, t) alone, to which jumps have to be brought after, or "jumps"."""
        return "velocity"

    @property
    def steps(self) -> int | None:
        """The optimiser steps after which the target is met and one has to stop; None for methods that converge."""
        return None

    def __call__(self, batch: Batch) -> Tuned:
        raise NotImplementedError(f"{type(self).__name__} needs a method __call__(self, batch) -> Tuned.")


def without_gradient() -> str:
    """Return the methods that need no gradient of the reward, as a list in words."""
    from steerfm import finetuning

    kinds = [getattr(finetuning, name) for name in finetuning.__all__]
    methods = [kind for kind in kinds if issubclass(kind, FineTuning) and kind is not FineTuning]
    names = [kind.__name__ for kind in methods if kind.needs_reward and not kind.needs_gradient]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def kept(function: Callable, checkpointing: bool) -> Callable:
    """Return the function; if checkpointing, one that keeps its arguments alone for the backward pass."""
    if not checkpointing:
        return function
    return lambda *arguments: checkpoint(function, *arguments, use_reentrant=False)


@torch.no_grad()
def draws_of(flow_map: FlowMap, batch: Batch, jumps: int) -> tuple[State, Scores]:
    """Return samples of a map in so many jumps, one a row, and their rewards, without a gradient."""
    x0 = few_jumps(flow_map, batch.normal(), jumps, batch.condition)
    return x0, batch.scores(x0)


def renoised(batch: Batch, x0: State, repeats: int) -> tuple[State, Times, State]:
    """Return x_t, t and the tangent w of `repeats` noisy states of each x0, t uniform on [0, 1]; (B * repeats, ...)."""
    path, x0 = batch.flow_map.path, x0.repeat_interleave(repeats, 0)
    x1, t = batch.normal(repeats), batch.uniform(repeats)
    return path.interpolate(x0, x1, t), t, path.tangent(x0, x1, t)


def by_row(losses: Values, repeats: int) -> Values:
    """Return the means of `repeats` neighbours, (B * repeats,) -> (B,)."""
    return losses.reshape(-1, repeats).mean(1)


def compared(values: Values, prompts: Sequence[str]) -> GroupStatistics:
    """Return what is known of each row's prompt, over all processes. Raises ConfigError where a row is alone."""
    group = group_statistics(values, prompts)
    if float(group.size.min()) < 2:
        raise ConfigError(
            "A prompt with one sample has no other to be compared with, and learns nothing: raise "
            "data.samples_per_prompt to 2 or more, 8 or so."
        )
    return group


def exponential_weights(rewards: Values, temperature: float, prompts: Sequence[str]) -> Values:
    """Return exp(r / temperature) over its mean among all rows of the same prompt, on all processes; (B,).

    Raises ConfigError for a prompt with one sample, whose weight would be 1 whatever its reward.
    """
    scaled = rewards.detach().double() / temperature
    weights = (scaled - compared(scaled, prompts).largest).exp()
    return (weights / group_statistics(weights, prompts).mean).to(rewards)


def effective_share(weights: Values) -> Tensor:
    """Return the effective sample size of weights over their number, over all processes; a number in (0, 1]."""
    everything = gather(weights).double()
    return effective_sample_size(everything.log()) / len(everything)
