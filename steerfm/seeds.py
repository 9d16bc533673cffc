"""Random numbers at sampling: sample i depends on its seed alone.

Every draw is a function of (seed, stream, step) and, for populations, of the particle's place; never of the
batch size, the device, the number of processes or what was drawn before. numpy's Philox generator is drawn
sequentially on the CPU, so that the first particles of a large population are those of a small one.

Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (counter-based generators).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import ConfigError

LARGE = 2**20  # numbers of a batch; above it the rows draw for themselves, so that no process draws them all
STREAMS = ("initial", "step", "resample", "select", "posterior", "training", "validation", "data")


def generator(seed: int, stream: str = "initial", step: int = 0) -> np.random.Generator:
    """Return the random stream that belongs to (seed, stream, step).

    Raises ConfigError for a negative seed or an unknown stream.
    """
    return np.random.Generator(np.random.Philox(_sequence(seed, stream, step)))


def torch_generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """Return torch's generator on the CPU that belongs to (seed, stream, step); raises as `generator` does.

    torch looks at the low 32 bits of a seed alone: seed and stream are mixed into those and the step is added,
    so that no two steps of a stream share a generator.
    """
    start = int(_sequence(seed, stream).generate_state(1)[0])
    return torch.Generator().manual_seed((start + step) % 2**32)


def noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    particles: int = 1,
    stream: str = "initial",
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normal noise, shape (len(seeds) * particles, *shape); a seed's particles are neighbours."""
    rows = [generator(seed, stream, step).standard_normal((particles, *shape)) for seed in seeds]
    return torch.from_numpy(np.concatenate(rows)).to(device=device, dtype=dtype)


def uniform(seeds: Sequence[int], *, count: int = 1, stream: str = "resample", step: int = 0) -> Tensor:
    """Return `count` uniform numbers in [0, 1) for each seed, shape (len(seeds), count), float64 on the CPU."""
    return torch.from_numpy(np.stack([generator(seed, stream, step).random(count) for seed in seeds]))


class RowDraws:
    """Random numbers for the rows of a training batch: a row's depend on (seed, step), its number and what it drew.

    rows: the numbers, in the global batch, of the rows that this process holds, so that a batch divided among
    processes draws what it would draw on one.
    """

    def __init__(self, seed: int, step: int, rows: Sequence[int]) -> None:
        self.rows = rows
        self._common = generator(seed, "training", step)
        self._own = [np.random.Generator(np.random.Philox(_sequence(seed, "training", step, row))) for row in rows]

    def normal(self, shape: Sequence[int], count: int = 1) -> Tensor:
        """Return standard normal numbers, (rows * count, *shape), float64; those of one row are neighbours."""
        return torch.from_numpy(np.concatenate([own.standard_normal((count, *shape)) for own in self._own]))

    def uniform(self, count: int = 1) -> Tensor:
        """Return numbers in [0, 1), (rows * count,), float64; those of one row are neighbours."""
        return torch.from_numpy(np.concatenate([own.random(count) for own in self._own]))

    def common(self, count: int = 1) -> list[float]:
        """Return `count` numbers in [0, 1) that are the same on every process."""
        return self._common.random(count).tolist()


class BatchGenerator(torch.Generator):
    """torch's generator of one process in training, which also knows the one that all processes share: see `drawn`.

    rows: the numbers, in the global batch of `total` rows, of the rows that this process holds. A number drawn from it
    directly belongs to the process; on one process there is no difference.
    """

    def __new__(cls, seed: int, step: int, rows: Sequence[int], total: int) -> BatchGenerator:
        return super().__new__(cls)

    def __init__(self, seed: int, step: int, rows: Sequence[int], total: int) -> None:
        alone = len(rows) == total
        self.shared: torch.Generator = self if alone else torch_generator(seed, "training", step)
        self.manual_seed(torch_generator(seed, "training", step if alone else step * total + rows[0]).initial_seed())
        self.rows, self.total = list(rows), total


class Shares(NamedTuple):
    """Hold how many rows a batch has, which of them are this process's, and the generator that processes share."""

    total: int
    rows: list[int]
    generator: torch.Generator | None

    def before(self, first: int) -> int:
        """Return how many of this process's rows come before a row of the batch."""
        return sum(row < first for row in self.rows)


def shares(count: int, generator: torch.Generator | None) -> Shares:
    """Return whose rows are drawn for a process that holds `count`: its own alone, but for a BatchGenerator."""
    if not isinstance(generator, BatchGenerator):
        return Shares(count, list(range(count)), generator)
    return Shares(generator.total, generator.rows, generator.shared)


def drawn(draw: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return draw(shape, generator=generator), a row's numbers being the same on any number of processes.

    draw: torch.rand or torch.randn. shape: (rows of this process, ...).
    """
    total, rows, source = shares(shape[0], generator)
    if source is None or total * math.prod(shape[1:]) <= LARGE:
        numbers = draw((total, *shape[1:]), generator=source)
        return numbers if len(rows) == total else numbers[rows]
    own = torch.randint(2**32, (total,), generator=source)[rows].tolist()
    return torch.stack([draw(shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in own])


@contextlib.contextmanager
def rows_between(generator: torch.Generator | None, first: int, last: int) -> Iterator[None]:
    """Let a BatchGenerator draw for the rows of its batch from `first` on, before `last`, alone inside the block."""
    if not isinstance(generator, BatchGenerator):
        yield
        return
    rows, total = generator.rows, generator.total
    generator.rows, generator.total = [row - first for row in rows if first <= row < last], last - first
    try:
        yield
    finally:
        generator.rows, generator.total = rows, total


def whole(seed: int) -> int:
    """Return the seed as an int; raises ConfigError for one that is negative or no whole number."""
    if seed < 0 or seed != int(seed):
        raise ConfigError(f"A seed must be a whole number of at least 0, got {seed}.")
    return int(seed)


def _sequence(seed: int, stream: str, *steps: int) -> np.random.SeedSequence:
    if stream not in STREAMS:
        raise ConfigError(f"Unknown random stream '{stream}'; the streams are {', '.join(STREAMS)}.")
    return np.random.SeedSequence(entropy=whole(seed), spawn_key=(STREAMS.index(stream), *steps))
