"""The first run at another run's cost: the best of as many of its own samples as that cost buys.

A method that costs sixteen times the base must beat keeping the best of sixteen samples of the base. What that gives
need not be run: it is the mean of the highest reward over all choices of n of the samples that the base has, prompt by
prompt, and the same choices give the held-out values of what would have been kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from steerfm.report.estimates import FEWEST_PROMPTS, RESAMPLES, Estimate, bootstrap, expanded_tail
from steerfm.report.sources import Source

ENOUGH = 4  # samples a prompt, in units of n, from which resampling them says how far the best of n may be off
_CHUNK = 2_000_000  # numbers sorted at a time


@dataclass(frozen=True)
class EqualCost:
    """Hold how a run differs, in its reward and held-out values, from the best of n samples of the first run.

    n: how often the first run's cost goes into the run's. `note` says why there is no figure where there is none.
    """

    label: str
    against: str
    n: int
    differences: dict[str, Estimate] = field(default_factory=dict)
    note: str = ""


def equal_cost(sources: Sequence[Source], cost: str) -> list[EqualCost]:
    """Return the runs that cost at least twice the first, each against the best of n of the first run's samples.

    The reward calls of choosing the best are not counted, unless `cost` is reward_calls. Prompts that the first run
    lacks are left out.
    """
    if not sources:
        return []
    base = _mean_cost(sources[0], cost)
    found = []
    for source in sources[1:]:
        n = math.floor(_mean_cost(source, cost) / base * (1 + 1e-9)) if base > 0 else 0
        if n >= 2:
            found.append(_against_best(sources[0], source, n))
    return found


def best_of(n: int, rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean of `values` at the highest of n of the N rewards, over all choices of n; last axis N, N >= n.

    The i-th smallest of N is the highest of a choice of n with probability C(i-1, n-1) / C(N, n).
    """
    order = np.argsort(rewards, axis=-1, kind="stable")
    return np.take_along_axis(values, order, -1) @ _weights(n, rewards.shape[-1])


def _weights(n: int, total: int) -> np.ndarray:
    """Return C(i-1, n-1) / C(total, n) for i = 1..total."""
    logs = np.full(total, -np.inf)
    for i in range(n, total + 1):
        logs[i - 1] = _log_choose(i - 1, n - 1) - _log_choose(total, n)
    return np.exp(logs)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _mean_cost(source: Source, cost: str) -> float:
    return float(np.mean([row["cost"].get(cost, 0.0) for row in source.rows]))


def _against_best(first: Source, source: Source, n: int) -> EqualCost:
    """Return the run's differences in every figure that both have, or why there are none."""
    metrics = ["reward", *(f"held_out.{name}" for name in source.names("held_out") if name in first.names("held_out"))]
    theirs, mine = _by_prompt(first, metrics), _by_prompt(source, metrics)
    prompts = [prompt for prompt in mine if prompt in theirs]
    if not prompts:
        return EqualCost(source.label, first.label, n, note="no prompt in common")
    fewest = min(theirs[prompt].shape[1] for prompt in prompts)
    if fewest < n:
        each = "" if prompts == [""] else " for each prompt"
        return EqualCost(source.label, first.label, n, note=f"needs {n:,} samples{each}, {first.label} has {fewest:,}")
    differences = {}
    for place, metric in enumerate(metrics):
        pools = [(theirs[p][0], theirs[p][place], mine[p][place]) for p in prompts]
        if all(np.isfinite(values).all() for pool in pools for values in pool):
            differences[metric] = _difference(pools, n)
    return EqualCost(source.label, first.label, n, differences)


def _by_prompt(source: Source, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the metrics (M, samples) of each prompt's samples that have a reward."""
    table = np.stack([source.values(metric) for metric in metrics])
    prompts = np.array([prompt for prompt, _ in source.pairs], dtype=object)
    scored = np.isfinite(table[0])
    return {prompt: table[:, scored & (prompts == prompt)] for prompt in dict.fromkeys(prompts[scored].tolist())}


def _difference(pools: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], n: int) -> Estimate:
    """Return the mean of the run's values minus the first run's best of n, prompts weighted by the run's samples."""
    weights = np.array([len(mine) for _, _, mine in pools], dtype=np.float64)
    gaps = np.array([mine.mean() - best_of(n, rewards, values) for rewards, values, mine in pools])
    mean, total = float(gaps @ weights / weights.sum()), int(weights.sum())
    if len(pools) >= FEWEST_PROMPTS:
        low, high = bootstrap(lambda i: (gaps * weights)[i].sum(1) / weights[i].sum(1), len(pools))
        return Estimate(mean, low, high, total)
    if any(len(rewards) < ENOUGH * n or len(mine) < 2 for rewards, _, mine in pools):
        return Estimate(mean, None, None, total)
    generator = np.random.default_rng(0)
    drawn = [_resampled(pool, n, generator) for pool in pools]
    means = np.stack(drawn, 1) @ weights / weights.sum()
    tail = expanded_tail(min(total, min(len(rewards) for rewards, _, _ in pools)))
    return Estimate(mean, float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail)), total)


def _resampled(pool: tuple[np.ndarray, np.ndarray, np.ndarray], n: int, generator: np.random.Generator) -> np.ndarray:
    """Return a prompt's difference (R,) for resamples of both runs' samples."""
    rewards, values, mine = pool
    found = []
    for size in _sizes(len(rewards)):
        theirs = generator.integers(len(rewards), size=(size, len(rewards)))
        ours = generator.integers(len(mine), size=(size, len(mine)))
        found.append(mine[ours].mean(1) - best_of(n, rewards[theirs], values[theirs]))
    return np.concatenate(found)


def _sizes(length: int) -> list[int]:
    per_chunk = max(1, _CHUNK // length)
    return [min(per_chunk, RESAMPLES - done) for done in range(0, RESAMPLES, per_chunk)]
