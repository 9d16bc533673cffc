"""Compare runs by what their folders hold: reward, held-out reward, diversity, distance to data, and cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steerfm.errors import RunError, missing_package, nearest
from steerfm.report.equal import EqualCost, equal_cost
from steerfm.report.estimates import Estimate, estimate
from steerfm.report.rows import SMALLEST_EQUAL, Geometry, Row, flat, reference_row, run_row
from steerfm.report.sources import COSTS, Source, load, load_all, same_tensor
from steerfm.report.warn import warnings_about

if TYPE_CHECKING:
    from altair import Chart
    from pandas import DataFrame

SUBSET_KEYS = ("label", "run", "where", "above")


@dataclass(frozen=True)
class Pair:
    """Hold the mean difference of a figure, run minus the first run, over the (prompt, seed) pairs both have."""

    label: str
    against: str
    metric: str
    difference: Estimate

    @property
    def within_noise(self) -> bool:
        """Say whether the 95% interval of the difference covers zero."""
        return self.difference.covers_zero


@dataclass(frozen=True)
class Line:
    """Hold one line of the picture: its column, its label, and the labels of its runs, such as one method's budgets."""

    group: str
    label: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Hold what was found: a row each, differences to the first run, and what makes the rows hard to compare.

    `x` is the cost that the plots put on their horizontal axis, and at which `equal_cost` compares. `equal_samples` is
    the number of samples at which every row's `frechet_equal` is taken, or None where all have the same number.
    `lines`: which runs belong together.
    """

    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    sources: tuple[Source, ...]
    x: str = "network_calls"
    subsets: tuple[dict[str, Any], ...] = ()
    equal_samples: int | None = None
    root: str = "runs"
    lines: tuple[Line, ...] = ()
    equal_cost: tuple[EqualCost, ...] = ()

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Return the folders of all runs that were read."""
        return tuple(
            dict.fromkeys([*(source.folder for source in self.sources), *(Path(row.run) for row in self.rows)])
        )

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """Return what the reader must know of single rows, (labels, note), once for the rows that have it in common."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note and row.kind != "subset":
                found.setdefault(row.note.rstrip(". "), []).append(row.label)
        return tuple((listed(labels), note) for note, labels in found.items())

    @cached_property
    def conclusions(self) -> list[str]:
        """Return what the figures say, in sentences; worked out once for all places that show it."""
        from steerfm.report.conclusions import conclusions  # which itself compares further pairs of runs

        return conclusions(self)

    def records(self) -> list[dict[str, Any]]:
        """Return a flat dictionary of plain values a row, with the same keys for all."""
        return [flat(row, list(self.held_out)) for row in self.rows]

    def table(self) -> DataFrame:
        """Return the rows as a pandas data frame: indexed by label, without the columns that no row fills.

        The columns are those of `records`; a figure that a row lacks is NaN. Needs the extra `report`.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise missing_package("pandas", "report", "A comparison as a data frame") from error
        frame = DataFrame(self.records()).set_index("label").dropna(axis="columns", how="all")
        texts = ("kind", "run", "note")
        return frame.astype({name: float for name in frame if frame[name].dtype == object and name not in texts})

    def plot(self) -> Chart:
        """Return what the page plots as an Altair chart, which a notebook shows. Needs the extra `report`."""
        try:
            import altair
        except ImportError as error:
            raise missing_package("altair", "report", "A comparison as a chart") from error
        from steerfm.report.charts import specification

        return altair.Chart.from_dict(specification(self))


def compare(
    runs: Sequence[str | Path],
    *,
    subsets: Sequence[Mapping[str, Any]] = (),
    x: str = "network_calls",
    root: str | Path = "runs",
    lines: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> Comparison:
    """Compare finished runs, given by folder or by name below `root`; the first is what the others are held against.

    Each subset {"label", "run", "where", "above"} adds a row of the samples of a run whose value "reward",
    "held_out.NAME" or "parts.NAME" lies above a number. Reference data add a row too. x: the cost that the plots
    use. lines: {column: {label: runs}}, compared runs that the picture joins, such as one method at several costs.
    Raises RunError for a run that is missing, unfinished, damaged or without samples, and for an unknown x, subset or
    run of a line.
    """
    if x not in COSTS:
        raise RunError(f"Unknown cost '{x}' for x{nearest(x, COSTS) or '.'} The costs are: {', '.join(COSTS)}.")
    sources = load_all(runs, root)
    joined = _lines(lines or {}, sources)
    geometries = _geometries(sources)
    warnings = warnings_about(sources)
    parts = [_Part(source, geometry) for source, geometry in zip(sources, geometries, strict=True)]
    for subset in subsets:
        part = _subset(subset, parts[: len(sources)], root)
        if part.mask is not None and part.mask.any():
            parts.append(part)
        else:
            warnings.append(f"No sample of '{part.source.label}' has {subset['where']} above {subset['above']}.")
    rows, equal = _rows(parts)
    return Comparison(
        rows=(*rows, *_reference_rows(sources, geometries)),
        pairs=tuple(pair for source in sources[1:] for pair in differences_of(source, sources[0])),
        equal_cost=tuple(equal_cost(sources, x)),
        warnings=tuple(warnings),
        prompts=tuple(dict.fromkeys(prompt for source in sources for prompt, _ in source.pairs)),
        held_out=tuple(dict.fromkeys(name for source in sources for name in source.names("held_out"))),
        sources=tuple(sources),
        x=x,
        subsets=tuple(dict(subset) for subset in subsets),
        equal_samples=equal,
        root=str(root),
        lines=joined,
    )


def _lines(asked: Mapping[str, Mapping[str, Sequence[str]]], sources: Sequence[Source]) -> tuple[Line, ...]:
    """Return the lines, their runs found by name or label among those compared."""
    known = {name: source.label for source in sources for name in (source.label, source.info.name)}
    found = []
    for group, lines in _checked(asked, "lines").items():
        for label, runs in _checked(lines, f"lines.{group}").items():
            if isinstance(runs, str) or not isinstance(runs, Sequence):
                raise RunError(f"The line '{label}' needs a list of runs, such as [{runs}], got {runs!r}.")
            for run in runs:
                if str(run) not in known:
                    near = nearest(str(run), known) or "."
                    raise RunError(f"The line '{label}' names '{run}', which is not compared{near} Add it to the runs.")
            found.append(Line(str(group), str(label), tuple(known[str(run)] for run in runs)))
    return tuple(found)


def _checked(asked: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(asked, Mapping):
        raise RunError(f"{where} has the form {{column: {{label: [RUN, ...]}}}}, got {asked!r}.")
    return asked


@dataclass(frozen=True)
class _Part:
    """Hold what a row is made of: a run, or those of its samples that a mask (N,) picks, and its reference data."""

    source: Source
    geometry: Geometry
    mask: np.ndarray | None = None
    label: str = ""

    @property
    def x0(self) -> Tensor | None:
        x0 = self.source.x0
        return x0 if x0 is None or self.mask is None else x0[torch.from_numpy(self.mask)]


def _rows(parts: Sequence[_Part]) -> tuple[list[Row], int | None]:
    """Return a row for each part, and the number of samples at which all were measured alike."""
    rows = [run_row(part.source, part.geometry, part.mask, part.label) for part in parts]
    equal = _equal_samples(rows)
    alike = [part.geometry.frechet_equal(part.x0, equal) for part in parts]
    return [dataclasses.replace(row, frechet_equal=found) for row, found in zip(rows, alike, strict=True)], equal


def _geometries(sources: Sequence[Source]) -> list[Geometry]:
    """Return the geometry of each run's reference data, made once for those that share it."""
    made: list[tuple[Source, Geometry]] = []
    for source in sources:
        known = [geometry for other, geometry in made if same_tensor(source.reference, other.reference)]
        made.append((source, known[0] if known else Geometry(source.reference)))
    return [geometry for _, geometry in made]


def _reference_rows(sources: Sequence[Source], geometries: Sequence[Geometry]) -> list[Row]:
    """Return a row for each different reference set."""
    distinct = {id(g): (s, g) for s, g in zip(reversed(sources), reversed(geometries), strict=True)}
    found = [(s, g) for s, g in reversed(distinct.values()) if s.reference is not None]
    return [
        reference_row(g, s.reference, "real data" if len(found) == 1 else f"real data of {s.label}", str(s.folder))
        for s, g in found
        if s.reference is not None
    ]


def _subset(subset: Mapping[str, Any], parts: Sequence[_Part], root: str | Path) -> _Part:
    """Return the part that a subset stands for, of one of the compared runs (by label, name or folder) or another."""
    missing = [key for key in SUBSET_KEYS if key not in subset]
    unknown = [key for key in subset if key not in SUBSET_KEYS]
    if missing or unknown:
        wrong = f"lacks '{missing[0]}'" if missing else f"has an unknown '{unknown[0]}'"
        raise RunError(f"A subset {wrong}: it needs {', '.join(SUBSET_KEYS)}, got {', '.join(map(str, subset))}.")
    wanted = str(subset["run"])
    known = [p for p in parts if wanted in (p.source.label, p.source.info.name, p.source.info.label)]
    known += [p for p in parts if Path(wanted) == p.source.folder]
    if known:
        source, geometry = known[0].source, known[0].geometry
    else:
        source = load(wanted, root)
        geometry = Geometry(source.reference)
    return _Part(source, geometry, _subset_mask(subset, source), str(subset["label"]))


def _subset_mask(subset: Mapping[str, Any], source: Source) -> np.ndarray:
    """Return which samples (N,) of the run the subset is made of."""
    where = str(subset["where"])
    source.check_where(where)
    try:
        return source.values(where) > float(subset["above"])
    except (TypeError, ValueError) as error:
        raise RunError(f"A subset's 'above' needs a number, got {subset['above']!r}.") from error


def _equal_samples(rows: Sequence[Row]) -> int | None:
    """Return the smallest fair number of samples among the rows that have a Fréchet distance, if they differ."""
    counts = {row.samples for row in rows if row.frechet is not None and row.samples >= SMALLEST_EQUAL}
    return min(counts) if len(counts) > 1 else None


def listed(labels: Sequence[str], most: int = 5) -> str:
    """Return labels as one text, those after the first few as a number."""
    more = len(labels) - most
    return f"{', '.join(labels[:most])} and {more} more" if more > 0 else ", ".join(labels)


def differences_of(source: Source, first: Source) -> list[Pair]:
    """Return how a run differs from another, on the (prompt, seed) pairs that both have once."""
    here, there = _places(source), _places(first)
    common = [pair for pair in here if pair in there]
    held_out = [f"held_out.{name}" for name in source.names("held_out") if name in first.names("held_out")]
    found = []
    for metric in ["reward", *held_out]:
        mine = source.values(metric)[[here[pair] for pair in common]]
        theirs = first.values(metric)[[there[pair] for pair in common]]
        difference = estimate(mine - theirs, [prompt for prompt, _ in common])
        if difference is not None:
            found.append(Pair(source.label, first.label, metric, difference))
    return found


def _places(source: Source) -> dict[tuple[str, int], int]:
    """Return where each (prompt, seed) pair that occurs once stands among the samples."""
    counts = Counter(source.pairs)
    return {pair: i for i, pair in enumerate(source.pairs) if counts[pair] == 1}
