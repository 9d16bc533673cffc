"""Random numbers at sampling: sample i depends on its seed alone.

Every draw is a function of (seed, stream, step) and, for populations, of the particle's place; never of the
batch size, the device, the number of processes or what was drawn before. numpy's Philox generator is drawn
sequentially on the CPU, so that the first particles of a large population are those of a small one.

Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (counter-based generators).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import ConfigError

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


def whole(seed: int) -> int:
    """Return the seed as an int; raises ConfigError for one that is negative or no whole number."""
    if seed < 0 or seed != int(seed):
        raise ConfigError(f"A seed must be a whole number of at least 0, got {seed}.")
    return int(seed)


def _sequence(seed: int, stream: str, *steps: int) -> np.random.SeedSequence:
    if stream not in STREAMS:
        raise ConfigError(f"Unknown random stream '{stream}'; the streams are {', '.join(STREAMS)}.")
    return np.random.SeedSequence(entropy=whole(seed), spawn_key=(STREAMS.index(stream), *steps))
