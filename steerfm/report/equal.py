"""The first run at another run's cost: the best of as many of its own samples as that cost buys.

A method that costs sixteen times the base must beat keeping the best of sixteen samples of the base. What that gives
need not be run: it is the mean of the highest reward over all choices of n of the samples that the base has, prompt by
prompt, and the same choices give the held-out values of what would have been kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

from steerfm.report.estimates import COVERAGE, FEWEST_PROMPTS, Estimate, bootstrap
from steerfm.report.sources import Source

Pool = tuple[np.ndarray, np.ndarray, np.ndarray]  # a prompt's rewards and values of the first run, values of the other
ENOUGH = 10  # samples a prompt, in units of n, from which they say how far the best of n may be off
NEARLY = 1.02  # what a cost may exceed that of n samples by and still be called equal


@dataclass(frozen=True)
class EqualCost:
    """Hold how a run differs, in its reward and held-out values, from the best of n samples of the first run.

    n: how often the first run's cost goes wholly into the run's, which is `ratio` times as much. `note` says why there
    is no figure where there is none.
    """

    label: str
    against: str
    n: int
    ratio: float
    differences: dict[str, Estimate] = field(default_factory=dict)
    note: str = ""

    @property
    def is_equal(self) -> bool:
        """Say whether n samples cost as much as the run's, and not notably less."""
        return self.ratio <= NEARLY * self.n


def equal_cost(sources: Sequence[Source], cost: str) -> list[EqualCost]:
    """Return the runs that cost at least twice the first, each against the best of n of the first run's samples.

    The reward calls of choosing the best are not counted, unless `cost` is reward_calls. Prompts that the first run
    lacks are left out, and so are runs without rewards.
    """
    scored = [source for source in sources if np.isfinite(source.values("reward")).any()]
    if not sources or sources[0] not in scored:
        return []
    base, found = _mean_cost(sources[0], cost), []
    for source in scored[1:]:
        ratio = _mean_cost(source, cost) / base if base > 0 else 0.0
        if ratio * (1 + 1e-9) >= 2:
            found.append(_against_best(sources[0], source, math.floor(ratio * (1 + 1e-9)), ratio))
    return found


def best_of(n: int, rewards: np.ndarray, values: np.ndarray) -> float:
    """Return the mean of `values` (N,) at the highest of n of the N rewards, over all choices of n; N >= n.

    The i-th smallest of N is the highest of a choice of n with probability C(i-1, n-1) / C(N, n). Of samples with the
    same reward each is as likely to be kept.
    """
    return float(_ordered(rewards, values) @ _weights(n, len(rewards)))


def _ordered(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values in rising order of their rewards, their mean where rewards are equal."""
    _, group = np.unique(rewards, return_inverse=True)
    means = np.bincount(group, values) / np.bincount(group)
    return means[np.sort(group)]


def _weights(n: int, total: int) -> np.ndarray:
    """Return C(i-1, n-1) / C(total, n) for i = 1..total."""
    logs = np.full(total, -np.inf)
    for i in range(n, total + 1):
        logs[i - 1] = _log_choose(i - 1, n - 1) - _log_choose(total, n)
    return np.exp(logs)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _mean_cost(source: Source, cost: str) -> float:
    """Return the mean cost of the samples that state one, 0 where none does."""
    stated = [row["cost"].get(cost) for row in source.rows]
    known = [float(value) for value in stated if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else 0.0


def _against_best(first: Source, source: Source, n: int, ratio: float) -> EqualCost:
    """Return the run's differences in every figure that both have, or why there are none."""
    found = EqualCost(source.label, first.label, n, ratio)
    metrics = ["reward", *(f"held_out.{name}" for name in source.names("held_out") if name in first.names("held_out"))]
    theirs, mine = _by_prompt(first, metrics), _by_prompt(source, metrics)
    prompts = [prompt for prompt in mine if prompt in theirs]
    if not prompts:
        return dataclasses.replace(found, note="no prompt in common")
    fewest = min(theirs[prompt].shape[1] for prompt in prompts)
    if fewest < n:
        each = "" if prompts == [""] else " for each prompt"
        return dataclasses.replace(found, note=f"needs {n:,} samples{each}, {first.label} has {fewest:,}")
    differences = {}
    for place, metric in enumerate(metrics):
        pools = [_known(theirs[p][0], theirs[p][place], mine[p][place]) for p in prompts]
        if all(len(rewards) >= n and len(ours) for rewards, _, ours in pools):
            differences[metric] = _difference(pools, n)
    return dataclasses.replace(found, differences=differences)


def _known(rewards: np.ndarray, values: np.ndarray, mine: np.ndarray) -> Pool:
    """Return the samples whose value is finite."""
    known = np.isfinite(values)
    return rewards[known], values[known], mine[np.isfinite(mine)]


def _by_prompt(source: Source, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the metrics (M, samples) of each prompt's samples that have a reward."""
    table = np.stack([source.values(metric) for metric in metrics])
    prompts = np.array([prompt for prompt, _ in source.pairs], dtype=object)
    scored = np.isfinite(table[0])
    return {prompt: table[:, scored & (prompts == prompt)] for prompt in dict.fromkeys(prompts[scored].tolist())}


def _difference(pools: Sequence[Pool], n: int) -> Estimate:
    """Return the mean of the run's values minus the first run's best of n, prompts weighted by the run's samples.

    Many prompts are resampled whole. For few, the variance is the jackknife's over the first run's samples (resampled
    with replacement their best would come out too low) plus that of the run's mean, and the interval Student's.
    Reference: Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 11.
    """
    weights = np.array([len(mine) for _, _, mine in pools], dtype=np.float64)
    gaps = np.array([mine.mean() - best_of(n, rewards, values) for rewards, values, mine in pools])
    mean, total = float(gaps @ weights / weights.sum()), int(weights.sum())
    if len(pools) >= FEWEST_PROMPTS:
        low, high = bootstrap(lambda i: (gaps * weights)[i].sum(1) / weights[i].sum(1), len(pools))
        return Estimate(mean, low, high, total, over_prompts=True)
    if any(len(rewards) < ENOUGH * n or len(mine) < 2 for rewards, _, mine in pools):
        return Estimate(mean, None, None, total)
    variances = [jackknife(n, rewards, values) + mine.var(ddof=1) / len(mine) for rewards, values, mine in pools]
    error = math.sqrt(float(np.array(variances) @ weights**2)) / weights.sum()
    freedom = min(total, min(len(rewards) for rewards, _, _ in pools)) - 1
    half = error * float(stdtrit(freedom, 0.5 + COVERAGE / 2))
    return Estimate(mean, mean - half, mean + half, total)


def jackknife(n: int, rewards: np.ndarray, values: np.ndarray) -> float:
    """Return the jackknife's variance of `best_of`, each of the N samples left out in turn; N > n."""
    ordered, total = _ordered(rewards, values), len(rewards)
    weights = _weights(n, total - 1)
    below = np.concatenate([[0.0], np.cumsum(ordered[:-1] * weights)])  # those before the one that is left out
    above = np.concatenate([[0.0], np.cumsum((ordered[1:] * weights)[::-1])])[::-1]  # those after it, one place lower
    left = below + above
    return float((total - 1) / total * np.square(left - left.mean()).sum())
