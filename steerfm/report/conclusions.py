"""What a comparison's figures say, in sentences: each with its figures, and "within noise" where that is all."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping

from steerfm.report.columns import COST_NAMES, change, compact
from steerfm.report.compare import Comparison, differences_of, listed
from steerfm.report.equal import EqualCost
from steerfm.report.estimates import Estimate
from steerfm.report.rows import Row
from steerfm.report.sources import Source

ALIKE = 0.8  # of the diversity they are held against: below, it is said
MOST_RUNS = 12  # of which each has a sentence
MOST_PARTED = 4
CHANCE = 0.05  # of an interval that leaves out zero though there is no difference


def conclusions(comparison: Comparison) -> list[str]:
    """Return what each run gained on the first and at what cost, what was hacked, and who leads in held-out values.

    Of more than `MOST_RUNS` runs only the latter two are told; the table has the rest.
    """
    comparison = _isolated(comparison)
    rows = {row.label: row for row in comparison.rows if row.kind == "run"}
    found = []
    for source in comparison.sources[1:] if len(comparison.sources) <= MOST_RUNS else ():
        changes = {pair.metric: pair.difference for pair in comparison.pairs if pair.label == source.label}
        said = [_gain(rows[source.label], rows[comparison.sources[0].label], changes, comparison.x)] if changes else []
        said += [_at_equal_cost(each, comparison.x) for each in comparison.equal_cost if each.label == source.label]
        found += [" ".join(said)] if said else []
    return [*found, *(said for name in comparison.held_out for said in _leader(comparison, rows, name))]


def _isolated(comparison: Comparison) -> Comparison:
    """Return the comparison with labels that are written from the right set apart, so that figures stay in order."""
    names = {source.label: _apart(source.label) for source in comparison.sources}
    if all(name == label for label, name in names.items()):
        return comparison
    return dataclasses.replace(
        comparison,
        rows=tuple(dataclasses.replace(row, label=names.get(row.label, row.label)) for row in comparison.rows),
        pairs=tuple(dataclasses.replace(p, label=names[p.label], against=names[p.against]) for p in comparison.pairs),
        sources=tuple(dataclasses.replace(source, label=names[source.label]) for source in comparison.sources),
        equal_cost=tuple(
            dataclasses.replace(e, label=names[e.label], against=names[e.against]) for e in comparison.equal_cost
        ),
    )


def _apart(label: str) -> str:
    turned = any(unicodedata.bidirectional(character) in ("R", "AL") for character in label)
    return f"\u2068{label}\u2069" if turned else label


def meaning(comparison: Comparison) -> str:
    """Return what the intervals stand for, and how many would leave out zero by chance."""
    kinds = {pair.difference.over_prompts for pair in comparison.pairs if pair.difference.low is not None}
    unit = "whole prompts" if kinds == {True} else "(prompt, seed) pairs, so for these prompts"
    unit += ", and of whole prompts where there are ten" if len(kinds) > 1 else ""
    count = len(comparison.pairs)
    expected = f" Of {count} differences, about {compact(CHANCE * count)} would leave out zero by chance alone."
    return f"Intervals hold 95% of bootstrap resamples of {unit}.{expected if count > 1 else ''}"


def hacked(changes: Mapping[str, Estimate]) -> list[str]:
    """Return the held-out names that fell, beyond noise, while the reward rose."""
    reward = changes.get("reward")
    if reward is None or reward.covers_zero or reward.mean < 0:
        return []
    return [
        _short(name) for name, each in changes.items() if name != "reward" and not each.covers_zero and each.mean < 0
    ]


def _gain(row: Row, first: Row, changes: Mapping[str, Estimate], cost: str) -> str:
    figures = ", ".join(f"{_short(name)} {change(found)}" for name, found in changes.items())
    said = f"{row.label} against {first.label}: {figures}{_price(row, first, cost)}."
    fallen = hacked(changes)
    said += f" Its reward rises while {' and '.join(fallen)}, held out, falls: it is hacked." if fallen else ""
    return said + _collapse(row, first)


def _collapse(row: Row, first: Row) -> str:
    """Return that the run's samples are alike, held against the real data, or else the first run's."""
    ratio, whose = row.diversity_ratio, "the real data"
    if ratio is None and row.diversity is not None and first.diversity:
        ratio, whose = row.diversity / first.diversity, f"those of {first.label}"
    return "" if ratio is None or ratio >= ALIKE else f" Its samples are {ratio:.0%} as diverse as {whose}."


def _price(row: Row, first: Row, cost: str) -> str:
    """Return what the run costs, in units of the first."""
    mine, base = row.costs.get(cost), first.costs.get(cost)
    if not mine or not base:
        return ""
    times = "the same" if compact(mine / base) == "1" else f"{compact(mine / base)} times the"
    return f", at {times} {COST_NAMES[cost]}"


def _at_equal_cost(found: EqualCost, cost: str) -> str:
    best = f"the best of {found.n:,} samples of {found.against}"
    price = f"at equal {COST_NAMES[cost]}" if found.is_equal else f"at {found.n:,} of its {compact(found.ratio)} times"
    if not found.differences:
        return f"What {best}, {price}, would give cannot be told: {found.note}."
    figures = ", ".join(f"{_short(name)} {change(each)}" for name, each in found.differences.items())
    return f"Against {best}, {price}: {figures}."


def _leader(comparison: Comparison, rows: Mapping[str, Row], name: str) -> list[str]:
    """Return who has the highest held-out value and whether it leads beyond noise, and who hacked the reward instead.

    Nothing where fewer than two runs have the value.
    """
    with_it = [s for s in comparison.sources if name in rows[s.label].held_out and rows[s.label].held_out[name].n > 1]
    known = sorted(with_it, key=lambda source: _mean(rows, source, name))
    if len(known) < 2:
        return []
    first, others = known[-1], known[-2::-1]
    second = others[0]
    lead = _changes(first, second).get(f"held_out.{name}")
    if lead is None:
        said = f"{first.label}; it has no (prompt, seed) pair in common with {second.label}"
    elif lead.low is None:
        said = f"{first.label}, which has one (prompt, seed) pair in common with {second.label}"
    elif lead.mean <= 0:
        said = f"{first.label}, though not on the {lead.n:,} (prompt, seed) pairs in common with {second.label}"
    elif lead.covers_zero:
        said = f"{first.label} and {second.label}, whose difference is within noise"
    else:
        said = f"{first.label}, {change(lead)} above {second.label}"
    parted = [(other, text) for other in others if (text := _parted(other, first, name))]
    if len(parted) > MOST_PARTED:
        names = listed([source.label for source, _ in parted])
        return [f"Highest {name}, held out: {said}.", f"{names} hack the reward, held against {first.label}."]
    return [f"Highest {name}, held out: {said}.", *(each for _, each in parted)]


def _parted(source: Source, leader: Source, name: str) -> str:
    """Return that a run's reward lies above the leader's while its held-out value lies below, where both are so."""
    changes = _changes(source, leader)
    if name not in hacked({key: changes[key] for key in ("reward", f"held_out.{name}") if key in changes}):
        return ""
    figures = f"reward {change(changes['reward'])}, {name} {change(changes[f'held_out.{name}'])}"
    return f"{source.label} hacks its reward, held against {leader.label}: {figures}."


def _changes(source: Source, first: Source) -> dict[str, Estimate]:
    return {pair.metric: pair.difference for pair in differences_of(source, first)}


def _mean(rows: Mapping[str, Row], source: Source, name: str) -> float:
    return rows[source.label].held_out[name].mean


def _short(metric: str) -> str:
    return metric.removeprefix("held_out.")
