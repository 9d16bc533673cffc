"""Draws of the reference that are kept: made and scored once for each prompt, then taken by their weights.

A step that weighs fresh draws by exp(r / T) pays for all of them and learns from those that count; one that takes kept
draws with probability exp(r / T) over its sum pays for none and learns from every row. Both have the same mean, up to
the inverse of the number of draws (sampling importance resampling: Rubin 1987, JASA 82, 543). What is kept follows from
the seed and the reference, and is made again where a run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steerfm.distributed import effective_sample_size, gather, names_everywhere, places_by_weight, world
from steerfm.finetuning.common import Batch
from steerfm.reward import Scores
from steerfm.sampling import few_jumps
from steerfm.seeds import noise
from steerfm.types import State, Values

log = logging.getLogger(__name__)

CHUNK = 64  # draws made at once, the same on every process


@dataclass(frozen=True)
class Pool:
    """Hold N draws of the reference for a prompt, on the CPU: clean states (N, *dim), rewards and their parts (N,)."""

    x0: State
    scores: Scores


def taken(batch: Batch, size: int, jumps: int) -> tuple[State, Scores, Values]:
    """Return a draw of p_ref(x0) exp(r / T) for each row, its rewards, and the share of its pool that counts; (B, ...).

    size: draws kept for a prompt, made in `jumps` jumps where they are not yet, each on one of the processes; all of
    them must call it.
    """
    pools = _pools(batch, size, jumps)
    places, shares = torch.empty(len(batch.prompts), dtype=torch.long), torch.empty(len(batch.prompts))
    numbers = batch.draws.uniform()
    for prompt, rows in _rows(batch.prompts).items():
        log_weights = pools[prompt].scores.total.double() / batch.temperature
        places[rows] = places_by_weight(log_weights, numbers[rows])
        shares[rows] = float(effective_sample_size(log_weights)) / size

    def of_rows(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).to(batch.flow_map.device)

    own = [(pools[prompt], int(place)) for prompt, place in zip(batch.prompts, places, strict=True)]
    total = of_rows([pool.scores.total[place] for pool, place in own])
    parts = {name: of_rows([pool.scores.parts[name][place] for pool, place in own]) for name in own[0][0].scores.parts}
    x0 = of_rows([pool.x0[place] for pool, place in own]).to(batch.flow_map.dtype)
    return x0, Scores(total, parts), shares.to(total)


def _pools(batch: Batch, size: int, jumps: int) -> dict[str, Pool]:
    """Return what is kept, by prompt, for the prompts of all processes; the batch's memory holds it."""
    pools: dict[str, Pool] = batch.memory.setdefault("pools", {})
    new = [prompt for prompt in names_everywhere(batch.prompts, batch.flow_map.device) if prompt not in pools]
    if new:
        log.info("Making %d draws of the base for each of %d prompts, once: '%s' first.", size, len(new), new[0])
    for prompt in new:
        pools[prompt] = _drawn(batch, prompt, size, jumps)
    return pools


@torch.no_grad()
def _drawn(batch: Batch, prompt: str, size: int, jumps: int) -> Pool:
    """Return what is kept for a prompt: a chunk a round from each process, the last one again where none is left."""
    rank, count = world()
    found, names = list[list[Tensor]](), list[str]()
    for first in range(0, size, count * CHUNK):
        start = min(first + rank * CHUNK, (size - 1) // CHUNK * CHUNK)
        x0, scores = _chunk(batch, prompt, range(start, min(start + CHUNK, size)), size, jumps)
        found.append([gather(values).cpu() for values in (x0, scores.total, *scores.parts.values())])
        names = list(scores.parts)
    x0, total, *parts = (torch.cat(rounds)[:size] for rounds in zip(*found, strict=True))
    return Pool(x0, Scores(total, dict(zip(names, parts, strict=True))))


def _chunk(batch: Batch, prompt: str, places: range, size: int, jumps: int) -> tuple[State, Scores]:
    """Return some of a prompt's draws, by their places among all, and their rewards."""
    reference, prompts = batch.reference, [prompt] * len(places)
    streams = [batch.seed * size + place for place in places]
    x1 = noise(streams, reference.data_shape, stream="data", device=reference.device, dtype=reference.dtype)
    x0 = few_jumps(reference, x1, jumps, reference.encode_prompts(prompts))
    return x0, replace(batch, prompts=prompts).scores(x0)


def _rows(prompts: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of the rows of each prompt."""
    found: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(row)
    return found
