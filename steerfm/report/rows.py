"""One row of a comparison: a run, a part of a run, or the real data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steerfm.metrics import frechet_between_halves, frechet_distance, mean_pairwise_distance
from steerfm.report.estimates import Estimate, estimate
from steerfm.report.sources import COSTS, Source

LARGEST_DIMENSION = 4096  # above, a distance between pixels or latents says little and takes minutes
MOST_ROWS = 4000  # of a set whose mean pairwise distance is taken
SMALLEST_EQUAL = 10  # below, a Fréchet distance at equal sample sizes says nothing
EQUAL_DRAWS = 8


@dataclass(frozen=True)
class Row:
    """Hold the figures of one row; None where there is nothing to measure.

    shares: by held-out name, the share above 0.5 where the values are probabilities. diversity: the mean pairwise
    distance in model space; diversity_ratio: over that of the reference data. frechet: to the reference data, in
    model space, with `samples` samples; frechet_equal: the same with the comparison's `equal_samples` samples.
    costs: per returned sample; empty for a subset, whose samples cost those that were thrown away too.
    divergence: D of the fine-tuned map from its base, as fine-tuning measured it last. tuning_seconds: what that took,
    once. For the reference data, frechet is the distance between two random halves.
    """

    label: str
    kind: Literal["run", "subset", "reference"]
    run: str
    samples: int
    reward: Estimate | None = None
    held_out: dict[str, Estimate] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    diversity: float | None = None
    diversity_ratio: float | None = None
    frechet: float | None = None
    frechet_equal: float | None = None
    costs: dict[str, float] = field(default_factory=dict)
    divergence: float | None = None
    temperature: float | None = None
    tuning_seconds: float | None = None
    note: str = ""

    @property
    def nominal(self) -> bool:
        """Say whether the temperature is a strength in the same units and not the temperature of a tilt."""
        return "nominal" in self.note.lower()


class Geometry:
    """Measure sets of samples against one reference set, once each."""

    def __init__(self, reference: Tensor | None) -> None:
        self.reference = reference if reference is not None and reference[0].numel() <= LARGEST_DIMENSION else None
        self._diversity = None if reference is None else diversity(reference)

    def ratio(self, value: float | None) -> float | None:
        """Return a mean pairwise distance over that of the reference."""
        return value / self._diversity if value is not None and self._diversity else None

    def frechet(self, x0: Tensor | None) -> float | None:
        """Return the Fréchet distance to the reference, or None where there is none or too little."""
        if self.reference is None or x0 is None or x0.shape[1:] != self.reference.shape[1:]:
            return None
        return None if _unfit(x0) or _unfit(self.reference) else frechet_distance(x0, self.reference)

    def frechet_equal(self, x0: Tensor | None, count: int | None) -> float | None:
        """Return the mean Fréchet distance of random draws of `count` of the samples, without replacement."""
        if count is None or x0 is None or len(x0) < count:
            return None
        generator = np.random.default_rng(0)
        repeats = 1 if len(x0) == count else EQUAL_DRAWS
        draws = [torch.from_numpy(generator.permutation(len(x0))[:count]) for _ in range(repeats)]
        found = [self.frechet(x0[draw]) for draw in draws]
        return None if None in found else float(np.mean([value for value in found if value is not None]))


def diversity(x0: Tensor | None) -> float | None:
    """Return the mean pairwise distance, over a fixed random choice where there are very many samples."""
    if x0 is None or _unfit(x0):
        return None
    if len(x0) > MOST_ROWS:
        x0 = x0[torch.from_numpy(np.random.default_rng(0).permutation(len(x0))[:MOST_ROWS])]
    return mean_pairwise_distance(x0)


def run_row(source: Source, geometry: Geometry, chosen: np.ndarray | None = None, label: str = "") -> Row:
    """Return the row of a run, or of the samples of it that the mask `chosen` (N,) picks."""
    mask = np.ones(len(source.rows), dtype=bool) if chosen is None else chosen
    x0 = None if source.x0 is None else source.x0[torch.from_numpy(mask)]
    prompts = [prompt for (prompt, _), kept in zip(source.pairs, mask, strict=True) if kept]
    held_out = {name: estimate(source.values(f"held_out.{name}")[mask], prompts) for name in source.names("held_out")}
    spread = diversity(x0)
    return Row(
        label=label or source.label,
        kind="run" if chosen is None else "subset",
        run=str(source.folder),
        samples=int(mask.sum()),
        reward=estimate(source.values("reward")[mask], prompts),
        held_out={name: found for name, found in held_out.items() if found},
        shares=_shares(source, mask),
        diversity=spread,
        diversity_ratio=geometry.ratio(spread),
        frechet=geometry.frechet(x0),
        costs=_costs(source) if chosen is None else {},
        divergence=source.divergence,
        temperature=source.temperature,
        tuning_seconds=source.tuning_seconds,
        note=source.note,
    )


def reference_row(geometry: Geometry, reference: Tensor, label: str, run: str) -> Row:
    """Return the row of the real data: its own diversity, and half against half."""
    spread, halves = diversity(reference), None
    if geometry.reference is not None and len(reference) >= 4 and bool(reference.isfinite().all()):
        halves = frechet_between_halves(reference, repeats=8 if reference[0].numel() <= 256 else 1)
    return Row(
        label,
        "reference",
        run,
        len(reference),
        diversity=spread,
        diversity_ratio=geometry.ratio(spread),
        frechet=halves,
        note="" if halves is None else "its Fréchet distance is that between two random halves",
    )


def flat(row: Row, held_out: list[str]) -> dict[str, Any]:
    """Return a row as one flat dictionary of plain values, with the same keys for every row of a comparison."""
    return {
        "label": row.label,
        "kind": row.kind,
        "run": row.run,
        "samples": row.samples,
        **_flat_estimate("reward", row.reward),
        **{
            key: value
            for name in held_out
            for key, value in {
                **_flat_estimate(f"held_out.{name}", row.held_out.get(name)),
                f"held_out.{name}_above_half": row.shares.get(name),
            }.items()
        },
        "diversity": row.diversity,
        "diversity_ratio": row.diversity_ratio,
        "frechet": row.frechet,
        "frechet_equal": row.frechet_equal,
        **{cost: row.costs.get(cost) for cost in COSTS},
        "divergence": row.divergence,
        "tuning_seconds": row.tuning_seconds,
        "temperature": row.temperature,
        "temperature_nominal": row.nominal,
        "note": row.note,
    }


def _flat_estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _shares(source: Source, mask: np.ndarray) -> dict[str, float]:
    """Return the share above 0.5 of every held-out value that lies in [0, 1] throughout the whole run."""
    found = {}
    for name in source.names("held_out"):
        values = source.values(f"held_out.{name}")
        known = values[np.isfinite(values)]
        if len(known) and known.min() >= 0 and known.max() <= 1 and np.isfinite(values[mask]).any():
            found[name] = float((values[mask & np.isfinite(values)] > 0.5).mean())
    return found


def _costs(source: Source) -> dict[str, float]:
    """Return the mean of every cost that the samples state."""
    stated = {cost: [row["cost"].get(cost) for row in source.rows] for cost in COSTS}
    known = {cost: [v for v in values if v is not None and math.isfinite(v)] for cost, values in stated.items()}
    return {cost: float(np.mean(values)) for cost, values in known.items() if values}


def _unfit(x0: Tensor) -> bool:
    """Say whether a set is too small to measure or holds values that are not finite."""
    return len(x0) < 2 or not bool(x0.isfinite().all())
