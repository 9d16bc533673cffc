"""Rewards made of rewards: clipped, normalised, an ensemble, the same one in less memory, or with a time limit.

Each hands on the values of the parts inside as these gave them, and is silent (NaN, see `Reward.abstains`) where
what it is made of is silent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steerfm.errors import ConfigError, RewardError
from steerfm.networks.sharing import called_on
from steerfm.reward import Reward, Scores, as_reward, parts_of, refuse_twins
from steerfm.types import Values

Combination = Literal["mean", "minimum", "lower_bound"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
GRACE = 30.0  # seconds that a call which lets no signal through has left before the process is ended


class Clipped(Reward):
    """Hold the total of a reward within [low, high]; None leaves a side open.

    The gradient beyond is zero, not passed straight through: a bound is there to take the incentive away, and a
    gradient that goes on pulling would not match the values. For a reward that starts under `low`, give `high` alone.
    """

    frozen = False

    def __init__(self, reward: Any, low: float | None = None, high: float | None = None) -> None:
        if low is None and high is None:
            raise ConfigError("clip needs a bound, got neither: write clip(low, high) or clip(high=...).")
        if low is not None and high is not None and not low < high:
            raise ConfigError(f"clip needs low < high, got low = {low} and high = {high}.")
        inner = as_reward(reward)
        super().__init__(_name(inner, f"clip({low}, {high})"))
        self.reward = inner
        _declare(self)
        self.low, self.high = low, high

    @property
    def members(self) -> list[Reward]:
        """The reward inside."""
        return [self.reward]

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score and clip the total."""
        scores = self.reward.evaluate(images, prompts, **metadata)
        return Scores(scores.total.clamp(self.low, self.high), scores.parts)


class Normalised(Reward):
    """Return (total - mean) / std of a reward; both as `steerfm reward calibrate` measures them."""

    frozen = False

    def __init__(self, reward: Any, mean: float, std: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ConfigError(f"normalised needs a finite mean and a positive std, got {mean} and {std}.")
        inner = as_reward(reward)
        super().__init__(_name(inner, f"normalised({mean:g}, {std:g})"))
        self.reward = inner
        _declare(self)
        self.mean, self.std = mean, std

    @property
    def members(self) -> list[Reward]:
        """The reward inside."""
        return [self.reward]

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score, centre and scale the total."""
        scores = self.reward.evaluate(images, prompts, **metadata)
        return Scores((scores.total - self.mean) / self.std, scores.parts)


class Ensemble(Reward):
    """Ask several rewards of one scale, so that what fools one of them gains little.

    combine: "mean"; "minimum", the least of them; "lower_bound", mean - width * standard deviation (of the members,
    divided by their number). Members of different scales are normalised first. Those that abstain are left out; where
    all do, so does the ensemble. `parts` hold every member's values and, under its own name, the combined one.

    Reference: Coste et al. 2024, arXiv 2310.02743, who subtract the variance where we take the standard deviation,
    which has the reward's own unit.
    """

    frozen = False

    def __init__(
        self, rewards: Sequence[Any], combine: Combination = "lower_bound", width: float = 1.0, name: str | None = None
    ) -> None:
        members = [as_reward(reward) for reward in rewards]
        if len(set(members)) < 2:
            raise ConfigError(f"An ensemble needs at least two different rewards, got {len(set(members))}.")
        if combine not in get_args(Combination):
            raise ConfigError(f"combine is one of {', '.join(get_args(Combination))}; got '{combine}'.")
        if not (math.isfinite(width) and width >= 0):
            raise ConfigError(f"width counts standard deviations and is at least 0, got {width}.")
        super().__init__(name or f"{combine}({', '.join(member.name for member in members)})")
        self.rewards = nn.ModuleList(members)
        self.combine: Combination = combine
        self.width = width
        _declare(self)
        refuse_twins(self)
        if self.name in {part.name for part in parts_of(self)}:
            raise ConfigError(f"The ensemble and one of its members are both called '{self.name}': rename one.")

    @property
    def members(self) -> list[Reward]:
        """The rewards that are asked."""
        return [member for member in self.rewards if isinstance(member, Reward)]

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score with every member and combine."""
        scores = [member.evaluate(images, prompts, **metadata) for member in self.members]
        total = combined(torch.stack([each.total for each in scores]), self.combine, self.width)
        parts = {name: values for each in scores for name, values in each.parts.items()}
        return Scores(total, {**parts, self.name: total})


class MemorySaving(Reward):
    """Score with the same values and gradients in less memory, for large networks and large batches.

    micro_batch: so many pictures at a time; metadata that are tensors, lists or tuples of the batch's length are cut
    along. recompute: keep no activations for the gradient, and score again in the backward pass, one micro-batch at
    a time (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174). dtype: "bfloat16" or "float16" computes under
    autocast, with rounding of that type; a reward that switches autocast off, as CLIPScore does, is not changed by it.
    offload: the reward's weights rest in the CPU's memory, and are copied to the pictures' device for each call.
    """

    frozen = False

    def __init__(
        self,
        reward: Any,
        micro_batch: int | None = None,
        recompute: bool = True,
        dtype: str | None = None,
        offload: bool = False,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch is a number of pictures, at least 1, got {micro_batch}.")
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype is one of {', '.join(DTYPES)} or null, got {dtype!r}.")
        inner = as_reward(reward)
        super().__init__(inner.name)
        self._resting = (inner.cpu(),) if offload else ()  # no part of what moves with this
        if not offload:
            self.reward = inner
        _declare(self)
        self.micro_batch, self.recompute, self.dtype = micro_batch, recompute, dtype

    @property
    def members(self) -> list[Reward]:
        """The reward inside."""
        return list(self._resting) or [self.reward]

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score piece by piece."""
        size = self.micro_batch or max(len(images), 1)
        pieces = []
        for start in range(0, max(len(images), 1), size):
            piece = slice(start, start + size)
            own = {key: _cut(value, piece, len(images)) for key, value in metadata.items()}
            pieces.append(self._piece(images[piece], prompts[piece], own))
        parts = {name: torch.cat([each.parts[name] for each in pieces]) for name in pieces[0].parts}
        return Scores(torch.cat([each.total for each in pieces]), parts)

    def _piece(self, images: Tensor, prompts: Sequence[str], metadata: dict[str, Any]) -> Scores:
        def evaluate(images: Tensor) -> Scores:
            with self._precision(images.device.type):
                if self._resting:
                    return called_on(images.device, self._resting[0], "evaluate", images, prompts, **metadata)
                return self.reward.evaluate(images, prompts, **metadata)

        if self.recompute and images.requires_grad and torch.is_grad_enabled():
            total, parts = checkpoint(evaluate, images, use_reentrant=False)  # type: ignore[misc]
            return Scores(total, parts)
        return evaluate(images)

    def _precision(self, device: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(device, DTYPES[self.dtype])


class TimeLimit(Reward):
    """Score as a reward does, for so many seconds at most: then RewardError names it, and what was saved stays.

    A call that lets no signal through, in code outside of Python, is given half a minute more; then the process is
    ended where it stands, with a traceback of where that is, and its run goes on from its last checkpoint. The limit is
    of scoring, not of the gradient. It works in the main thread of a process alone, where training and sampling are.
    """

    frozen = False

    def __init__(self, reward: Any, seconds: float) -> None:
        if not seconds > 0:
            raise ConfigError(f"A time limit is a positive number of seconds, got {seconds}.")
        inner = as_reward(reward)
        super().__init__(inner.name)
        self.reward = inner
        _declare(self)
        self.seconds = seconds

    @property
    def members(self) -> list[Reward]:
        """The reward inside."""
        return [self.reward]

    def evaluate(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Scores:
        """Score in time."""
        with _time_limit(self.seconds, self.name):
            return self.reward.evaluate(images, prompts, **metadata)


@contextlib.contextmanager
def _time_limit(seconds: float, name: str) -> Iterator[None]:
    """Raise RewardError where the block takes longer; other alarms that were set go on after it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        raise RewardError(
            f"'{name}' has a time limit, which needs the main thread of a process on Linux or macOS: leave it out."
        )

    def late(number: int, frame: Any) -> None:
        raise RewardError(
            f"'{name}' gave no answer within {seconds:g} s: find out what it waits for, or give it more time, and run "
            "the same command again."
        )

    before, start = signal.signal(signal.SIGALRM, late), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


def combined(values: Tensor, combine: Combination, width: float = 1.0) -> Values:
    """Return the mean, minimum or lower confidence bound of the members' values (M, B), NaN ones left out; (B,)."""
    speaks = ~values.isnan()
    count = speaks.sum(0)
    if combine == "minimum":
        lowest = torch.where(speaks, values, torch.inf).amin(0)
        return torch.where(count > 0, lowest, torch.nan)
    mean = torch.where(speaks, values, 0.0).sum(0) / count
    if combine == "mean":
        return mean
    variance = torch.where(speaks, values - mean, 0.0).square().sum(0) / count
    tiny = torch.finfo(values.dtype).tiny  # members that agree to the last bit: a gradient of zero, not of infinity
    return mean - width * variance.clamp(min=tiny).sqrt()


def _name(inner: Reward, call: str) -> str:
    """Return the name of what `call` makes of a reward, as one would type it."""
    return f"({inner.name}).{call}" if " " in inner.name else f"{inner.name}.{call}"


def _declare(reward: Reward) -> None:
    """Declare of a reward what its members declare."""
    reward.differentiable = all(member.differentiable for member in reward.members)
    reward.needs_prompt = any(member.needs_prompt for member in reward.members)


def _cut(value: Any, piece: slice, count: int) -> Any:
    """Return the piece of a value that has one entry a sample, any other value whole."""
    whole = isinstance(value, Tensor) and value.ndim == 0
    return value[piece] if isinstance(value, (Tensor, list, tuple)) and not whole and len(value) == count else value
