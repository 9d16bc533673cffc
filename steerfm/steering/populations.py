"""Weighted populations, one a (prompt, seed) pair: weigh, resample, and draw the sample that is returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from steerfm import seeds as seeding
from steerfm.distributed import draw_ancestors, effective_sample_size, gather_particles, places_by_weight, shard, world
from steerfm.errors import ConfigError
from steerfm.steering.common import Outcome, Run, Steering, pick
from steerfm.types import State, Values

Resampling = Literal["systematic", "stratified"]


@dataclass(frozen=True, kw_only=True)
class Populations(Steering):
    """Steer with a weighted population a pair, resampled where the weights are too uneven.

    resample_below: the effective sample size, as a share of the particles, below which a population is resampled;
    above 1 it always is, at 0 never. resampling: "systematic" or "stratified". split: divide the particles of every
    pair among the processes; without it a pair's population stays on the process that has the pair.
    """

    resample_below: float = 0.5
    resampling: Resampling = "systematic"
    split: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.resample_below >= 0:
            raise ConfigError(f"resample_below is a share of the particles, at least 0; got {self.resample_below}.")
        if self.resampling not in get_args(Resampling):
            raise ConfigError(f"resampling is 'systematic' or 'stratified', got '{self.resampling}'.")

    def start(self, run: Run, particles: int) -> Population:
        """Return populations of initial noise, equally weighted.

        Raises ConfigError where they are split among more processes than there are particles.
        """
        if self.split and particles < world()[1]:
            raise ConfigError(
                f"split=true gives every process a share of the particles: got {particles} for {world()[1]} processes."
            )
        x = run.noise(particles)
        log_weights = x.new_zeros(len(run.seeds), len(x) // len(run.seeds), dtype=torch.float64)
        return Population(x, log_weights, log_weights.new_zeros(len(run.seeds)), self)


@dataclass
class Population:
    """Hold the particles of all pairs: states (B * P, *dim), log-weights (B, P) since the last resampling.

    Where they are split over processes the rows are this process's share. log_evidence: (B,), the logarithm of the
    product of the mean weights at the resamplings so far, as in Del Moral 2004, "Feynman-Kac formulae", section 2.3.
    """

    x: State
    log_weights: Tensor
    log_evidence: Values
    options: Populations

    @property
    def all_log_weights(self) -> Tensor:
        """The log-weights of every process's particles, (B, P)."""
        return self.everyone(self.log_weights)

    @property
    def effective_sample_size(self) -> Values:
        """The effective sample size of each population, in particles, (B,)."""
        return effective_sample_size(self.all_log_weights)

    def everyone(self, values: Tensor) -> Tensor:
        """Return the values of every process's particles; (B, p, ...) -> (B, P, ...)."""
        return gather_particles(values) if self.options.split else values

    def weigh(self, log_factors: Tensor) -> None:
        """Multiply the weights by exp(log_factors), (B * P,) or (B, P)."""
        self.log_weights = self.log_weights + log_factors.double().reshape(self.log_weights.shape)

    def resample(self, seeds: Sequence[int], step: int, *others: Tensor) -> list[Tensor]:
        """Resample the populations whose weights are too uneven, and return `others` (B * P, ...) of the survivors.

        Their weights become equal; states and others move with their particles.
        """
        log_weights = self.all_log_weights
        count = log_weights.shape[1]
        small = effective_sample_size(log_weights) < self.options.resample_below * count
        if not small.any():
            return list(others)
        per_seed = count if self.options.resampling == "stratified" else 1
        uniform = seeding.uniform(seeds, count=per_seed, stream="resample", step=step).to(log_weights)
        slots = torch.arange(count, device=log_weights.device)
        ancestors = torch.where(small[:, None], draw_ancestors(log_weights, uniform), slots)
        self.log_evidence = self.log_evidence + torch.where(small, log_mean_exp(log_weights), 0.0)
        self.log_weights = torch.where(small[:, None], 0.0, self.log_weights)
        self.x = self._moved(self.x, ancestors)
        return [self._moved(rows, ancestors) for rows in others]

    def outcome(self, seeds: Sequence[int], note: str = "") -> Outcome:
        """Return one particle a pair, drawn by its weight, and the population it was drawn from."""
        particles = self._shared(self.x)
        log_weights = self.all_log_weights
        chosen = draw_by_weight(log_weights, seeds)
        return Outcome(
            pick(particles.flatten(0, 1), chosen),
            log_weights.log_softmax(1),
            particles,
            self.log_evidence + log_mean_exp(log_weights),
            note,
        )

    def heaviest(self, rows: Tensor) -> Tensor:
        """Return each pair's row of the particle of most weight; (B * P, *dim) -> (B, *dim)."""
        return pick(self._shared(rows).flatten(0, 1), self.all_log_weights.argmax(1))

    def mean(self, values: Values) -> Values:
        """Return each pair's mean of a value, by weight; (B * P,) -> (B,)."""
        weights = self.all_log_weights.softmax(1)
        return (weights * self._shared(values).to(weights)).sum(1)

    def _shared(self, rows: Tensor) -> Tensor:
        """Return the rows of every process by pair; (B * p, ...) -> (B, P, ...)."""
        return self.everyone(rows.reshape(*self.log_weights.shape, *rows.shape[1:]))

    def _moved(self, rows: Tensor, ancestors: Tensor) -> Tensor:
        """Return the rows of this process's slots after every slot took its ancestor's; (B * p, ...)."""
        everything = self._shared(rows)
        pairs = torch.arange(len(ancestors), device=rows.device)[:, None]
        own = ancestors[:, shard(list(range(ancestors.shape[1])))] if self.options.split else ancestors
        return everything[pairs, own.to(rows.device)].flatten(0, 1)


def draw_by_weight(log_weights: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return one particle a population, drawn by its weight with the seed's own number; (B, P) -> (B,) long."""
    return places_by_weight(log_weights, seeding.uniform(seeds, stream="select")).squeeze(1)


def log_mean_exp(log_weights: Tensor) -> Values:
    """Return the logarithm of the mean weight of each population; (B, P) -> (B,)."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])
