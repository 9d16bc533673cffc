"""Laws of (s, t) in training and time grids in sampling. s is the source time, t the target; t <= s is toward data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.types import Times


class TimeLaw(Protocol):
    """Draw n pairs (s, t) for a training step; the first rows lie on the diagonal s = t."""

    def __call__(self, n: int, generator: torch.Generator | None = None, step: int = 0) -> tuple[Times, Times]: ...

    def diagonal_rows(self, n: int) -> int:
        """Return how many of n rows have s = t."""
        ...

    def one(self, n: int, generator: torch.Generator | None = None) -> Times:
        """Draw n single times, as those of the diagonal are."""
        ...


@dataclass(frozen=True)
class Triangle:
    """Draw (s, t) uniformly from the triangle 0 <= t <= s <= 1, a share of the rows on its diagonal.

    diagonal: share of rows with s = t, which learn the velocity; in [0, 1]. both: also draw t > s, for maps
    that must encode pictures to noise. Reference: Boffi et al. 2025, arXiv 2505.18825 (three quarters).
    """

    diagonal: float = 0.75
    both: bool = False

    def __post_init__(self) -> None:
        _check_share(self.diagonal)

    def diagonal_rows(self, n: int) -> int:
        return round(self.diagonal * n)

    def __call__(self, n: int, generator: torch.Generator | None = None, step: int = 0) -> tuple[Times, Times]:
        a, b = torch.rand(2, n, generator=generator)
        return _order(a, b, self.diagonal_rows(n), self.both)

    def one(self, n: int, generator: torch.Generator | None = None) -> Times:
        return torch.rand(n, generator=generator)


@dataclass(frozen=True)
class LogitNormal:
    """Draw s and t as sorted sigmoids of normals, a share of the rows on the diagonal.

    mean and std are those of the normal before the sigmoid. Reference: Esser et al. 2024, arXiv 2403.03206,
    for one time; Geng et al. 2025, arXiv 2505.13447 (MeanFlow), for pairs, with mean -0.4 and std 1.
    """

    mean: float = -0.4
    std: float = 1.0
    diagonal: float = 0.75
    both: bool = False

    def __post_init__(self) -> None:
        _check_share(self.diagonal)

    def diagonal_rows(self, n: int) -> int:
        return round(self.diagonal * n)

    def __call__(self, n: int, generator: torch.Generator | None = None, step: int = 0) -> tuple[Times, Times]:
        a, b = torch.sigmoid(self.mean + self.std * torch.randn(2, n, generator=generator))
        return _order(a, b, self.diagonal_rows(n), self.both)

    def one(self, n: int, generator: torch.Generator | None = None) -> Times:
        return torch.sigmoid(self.mean + self.std * torch.randn(n, generator=generator))


@dataclass(frozen=True)
class Anchored:
    """Let off-diagonal pairs of another law start at noise, s = 1, or end at data, t = 0, more often.

    law: of the pairs. start, end: the probability that s is set to 1, and that t is set to 0, each by its own draw,
    in [0, 1]. The longest jumps and look-aheads are what sampling uses most, and other laws hardly meet them.
    """

    law: TimeLaw
    start: float = 0.25
    end: float = 0.25

    def __post_init__(self) -> None:
        for name, share in (("start", self.start), ("end", self.end)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} is a probability and must lie in [0, 1], got {share}.")

    def diagonal_rows(self, n: int) -> int:
        return self.law.diagonal_rows(n)

    def __call__(self, n: int, generator: torch.Generator | None = None, step: int = 0) -> tuple[Times, Times]:
        s, t = self.law(n, generator, step)
        off = torch.arange(n) >= self.diagonal_rows(n)
        start, end = torch.rand(2, n, generator=generator)
        return s.masked_fill(off & (start < self.start), 1.0), t.masked_fill(off & (end < self.end), 0.0)

    def one(self, n: int, generator: torch.Generator | None = None) -> Times:
        return self.law.one(n, generator)


@dataclass(frozen=True)
class Dyadic:
    """Draw off-diagonal pairs of interval 2^-k, k from 0 to `levels`, that start at its multiples.

    diagonal: share of rows with s = t, uniform on [0, 1]. rounds: training steps at each level, from the shortest
    interval to the longest, where it then stays; None draws the level anew for every row. start: the training step at
    which the first round begins. Reference: Frans et al. 2024, arXiv 2410.12557 (shortcut models); rounds: Salimans and
    Ho 2022, arXiv 2202.00512 (progressive distillation).
    """

    levels: int = 7
    diagonal: float = 0.75
    rounds: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        _check_share(self.diagonal)
        if self.levels < 0 or (self.rounds is not None and self.rounds < 1) or self.start < 0:
            raise ConfigError(
                "levels and start are 0 or more, rounds 1 step or more or none: got "
                f"{self.levels}, {self.start} and {self.rounds}."
            )

    def diagonal_rows(self, n: int) -> int:
        return round(self.diagonal * n)

    def __call__(self, n: int, generator: torch.Generator | None = None, step: int = 0) -> tuple[Times, Times]:
        one, place = torch.rand(2, n, generator=generator)
        level = torch.randint(0, self.levels + 1, (n,), generator=generator)
        if self.rounds is not None:
            level = torch.full((n,), max(self.levels - max(step - self.start, 0) // self.rounds, 0))
        count = 2.0**level
        t = (place * count).floor() / count
        on = torch.arange(n) < self.diagonal_rows(n)
        return torch.where(on, one, t + 1 / count), torch.where(on, one, t)

    def one(self, n: int, generator: torch.Generator | None = None) -> Times:
        return torch.rand(n, generator=generator)


@dataclass(frozen=True)
class Limited:
    """Shorten the intervals of another law by the factor `reach`, in (0, 1]: none is longer than that.

    growing: training steps over which the reach grows from 0 to `reach`, a curriculum; 0 is none.
    """

    law: TimeLaw
    reach: float = 1.0
    growing: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.reach <= 1 or self.growing < 0:
            raise ConfigError(f"reach lies in (0, 1] and growing is 0 or more, got {self.reach} and {self.growing}.")

    def diagonal_rows(self, n: int) -> int:
        return self.law.diagonal_rows(n)

    def __call__(self, n: int, generator: torch.Generator | None = None, step: int = 0) -> tuple[Times, Times]:
        s, t = self.law(n, generator, step)
        return s, s + self.reach * (min(step / self.growing, 1.0) if self.growing else 1.0) * (t - s)

    def one(self, n: int, generator: torch.Generator | None = None) -> Times:
        return self.law.one(n, generator)


def time_grid(steps: int, start: float = 1.0, end: float = 0.0) -> list[float]:
    """Return steps + 1 equally spaced times from `start` to `end`, both included."""
    if steps < 1:
        raise ConfigError(f"A sampler needs at least one step, got {steps}.")
    return [start + (end - start) * i / steps for i in range(steps)] + [end]


def karras_grid(steps: int, rho: float = 7.0, smallest: float = 1e-3) -> list[float]:
    """Return steps + 1 times whose 1/rho-th powers are equally spaced from 1 to `smallest`, and 0 behind them.

    rho: positive; above 1 it crowds them near data. smallest: the last time but one, in (0, 1). Reference: Karras
    et al. 2022, arXiv 2206.00364, eq. (5), with the time in place of sigma, as diffusers has it for flows.
    """
    if steps < 1 or not rho > 0 or not 0 < smallest < 1:
        raise ConfigError(
            f"Karras' times need at least one step, rho > 0 and smallest in (0, 1), got {steps}, {rho} and {smallest}."
        )
    last = smallest ** (1 / rho) - 1
    return [(1 + last * i / max(steps - 1, 1)) ** rho for i in range(steps)] + [0.0]


def shifted_grid(steps: int, shift: float = 3.0) -> list[float]:
    """Return steps + 1 times m t / (1 + (m - 1) t) of equally spaced t, with m = shift.

    shift: positive; above 1 it crowds them near noise.
    Reference: Esser et al. 2024, arXiv 2403.03206 (Stable Diffusion 3), where m is the root of the ratio of two
    resolutions, 3 for its pictures of 1024 x 1024.
    """
    if not shift > 0:
        raise ConfigError(f"shift multiplies the odds of noise to data and must be positive, got {shift}.")
    return [shift * t / (1 - t + shift * t) for t in time_grid(steps)]  # so written, 1 stays exactly 1


def as_grid(steps: int | Sequence[float]) -> list[float]:
    """Return the times of a sampler: `steps` equal steps from 1 to 0, or the given times themselves.

    Raises ConfigError unless given times are two or more that fall within [0, 1].
    """
    if isinstance(steps, int):
        return time_grid(steps)
    times = [float(t) for t in steps]
    falling = all(s > t for s, t in itertools.pairwise(times))
    if len(times) < 2 or not falling or not (times[0] <= 1 and times[-1] >= 0):
        raise ConfigError(f"A sampler's times are two or more that fall from noise, 1, toward data, 0; got {times}.")
    return times


def _order(a: Tensor, b: Tensor, diagonal: int, both: bool) -> tuple[Times, Times]:
    s, t = (a, b) if both else (torch.maximum(a, b), torch.minimum(a, b))
    # The diagonal's times follow the law of one draw, not that of the larger of two.
    s = torch.cat([a[:diagonal], s[diagonal:]])
    t = torch.cat([a[:diagonal], t[diagonal:]])
    return s, t


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"diagonal is a share of the batch and must lie in [0, 1], got {share}.")
