"""The columns of a comparison, once for the terminal, the page and the Markdown table: title, text, sort key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steerfm.report.compare import Comparison, Pair
from steerfm.report.estimates import Estimate
from steerfm.report.rows import Row

NOTHING = "–"
COST_NAMES = {
    "network_calls": "network calls",
    "reward_calls": "reward calls",
    "reward_gradients": "reward gradients",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Column:
    """Hold a column: what stands above it, what it means, and how a row fills it.

    `value` is the number (or name) that sorts, `detail` a longer text such as the interval.
    """

    title: str
    meaning: str
    value: Callable[[Row], float | str | None]
    text: Callable[[Row], str]
    detail: Callable[[Row], str] = lambda row: ""
    numeric: bool = True


_NAME = Column("run", "what the row is made of", lambda row: row.label, lambda row: row.label, numeric=False)


def columns(comparison: Comparison) -> list[Column]:
    """Return the columns that at least one row fills."""
    return [column for column in (_NAME, *quality(comparison), *costs()) if _filled(column, comparison)]


def column_groups(comparison: Comparison) -> list[list[Column]]:
    """Return the same columns in two groups for narrow places, what came out and what it cost, each with the name."""
    groups = [[column for column in group if _filled(column, comparison)] for group in (quality(comparison), costs())]
    return [[_NAME, *group] for group in groups if group]


def quality(comparison: Comparison) -> list[Column]:
    """Return the columns that say what came out."""
    frechet = "Fréchet distance to the reference data, in model space; depends on n"
    equal = "the same with equally many samples in every row, the mean of random draws"
    divergence = "divergence of the fine-tuned map from its base, in nats of model space, as fine-tuning measured it"
    spread = "mean pairwise distance in model space, and its ratio to the reference data's"
    return [
        Column("n", "samples that the row is made of", lambda row: row.samples, lambda row: f"{row.samples:,}"),
        _estimated("reward", "mean reward; 95% bootstrap interval", lambda row: row.reward),
        *(column for name in comparison.held_out for column in _held_out(name, is_probability(comparison.rows, name))),
        Column("diversity", spread, lambda row: row.diversity, _diversity),
        _plain("Fréchet", frechet, lambda row: row.frechet, number),
        _plain(f"Fréchet, n = {comparison.equal_samples}", equal, lambda row: row.frechet_equal, number),
        _plain("D", divergence, lambda row: row.divergence, number),
    ]


def costs() -> list[Column]:
    """Return the columns that say what it cost."""
    calls = "network forward passes a sample; a backward pass counts two"
    gradients = "pictures a sample whose reward was back-propagated"
    temperature = "temperature; nominal: a strength in the same units, not that of a tilt"
    return [
        _plain("network calls", calls, lambda row: row.costs.get("network_calls"), compact),
        _plain("reward calls", "pictures scored a sample", lambda row: row.costs.get("reward_calls"), compact),
        _plain("reward gradients", gradients, lambda row: row.costs.get("reward_gradients"), compact),
        _plain("s/sample", "wall-clock seconds a sample", lambda row: row.costs.get("seconds"), compact),
        _plain("tuning, s", "seconds of fine-tuning, spent once before", lambda row: row.tuning_seconds, compact),
        Column("T", temperature, lambda row: row.temperature, _temperature),
    ]


def differences(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[Pair | None]]]]:
    """Return the figures, and for every run but the first how it differs from the first in each (None: unknown)."""
    figures = list(dict.fromkeys(pair.metric for pair in comparison.pairs))
    labels = list(dict.fromkeys(pair.label for pair in comparison.pairs))
    found = {(pair.label, pair.metric): pair for pair in comparison.pairs}
    return figures, [(label, [found.get((label, figure)) for figure in figures]) for label in labels]


def difference_text(pair: Pair | None) -> str:
    """Return a paired difference as text."""
    return NOTHING if pair is None else change(pair.difference)


def change(found: Estimate) -> str:
    """Return a difference such as "+0.331 ± 0.114", with "(within noise)" where its interval covers zero."""
    known = found.low is not None
    said = " (within noise)" if found.covers_zero else ""
    return f"{'+' if found.mean > 0 else ''}{plus_minus(found)}{said if known else ' (no interval)'}"


def is_probability(rows: Sequence[Row], name: str) -> bool:
    """Say whether a held-out value is a probability: in [0, 1] in every run that has it, and above one half in some.

    A cosine, which some rewards are, lies in [0, 1] too, but never that high.
    """
    shares = [row.shares.get(name) for row in rows if name in row.held_out and row.kind == "run"]
    return None not in shares and any(shares)


def number(value: float | None) -> str:
    """Return a number with about three digits, without an exponent where people would not write one."""
    if value is None:
        return NOTHING
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{_decimals(value)}f}" if abs(value) >= 0.001 else f"{value:.1e}"


def compact(value: float | None) -> str:
    """Return a number with at most three digits and no zeros at its end, for costs and settings."""
    return NOTHING if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plus_minus(found: Estimate | None) -> str:
    """Return a mean and half of the width of its interval, to two digits of the latter, such as "0.913 ± 0.021"."""
    if found is None:
        return NOTHING
    if found.low is None or found.high is None or found.low == found.high:
        return number(found.mean)
    half = (found.high - found.low) / 2
    if not (math.isfinite(half) and half > 0):
        return number(found.mean)
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 4)
    return f"{found.mean:,.{decimals}f} ± {half:,.{decimals}f}"


def interval(found: Estimate | None) -> str:
    """Return the interval in words, or ""."""
    if found is None or found.low is None:
        return ""
    return f"95% interval {number(found.low)} to {number(found.high)}, over {found.n:,} samples"


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return NOTHING if share is None else f"{share:.0%}"


def _decimals(value: float) -> int:
    size = abs(value)
    return 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3


def _estimated(title: str, meaning: str, get: Callable[[Row], Estimate | None]) -> Column:
    def value(row: Row) -> float | None:
        found = get(row)
        return None if found is None else found.mean

    return Column(title, meaning, value, lambda row: plus_minus(get(row)), lambda row: interval(get(row)))


def _plain(
    title: str, meaning: str, get: Callable[[Row], float | None], write: Callable[[float | None], str]
) -> Column:
    return Column(title, meaning, get, lambda row: write(get(row)))


def _filled(column: Column, comparison: Comparison) -> bool:
    return any(column.value(row) is not None for row in comparison.rows)


def _held_out(name: str, probability: bool) -> list[Column]:
    """Return a held-out value's column, and for a probability that of its share above one half."""
    meaning = f"mean of {name}, never optimised; 95% bootstrap interval"
    mean = _estimated(f"{name}, held out", meaning, lambda row: row.held_out.get(name))
    share = Column(
        f"{name} > ½",
        f"share of samples with {name} above one half",
        lambda row: row.shares.get(name),
        lambda row: percent(row.shares.get(name)),
    )
    return [mean, share] if probability else [mean]


def _diversity(row: Row) -> str:
    if row.diversity is None or row.diversity_ratio is None:
        return number(row.diversity)
    return f"{number(row.diversity)} ({row.diversity_ratio:.0%})"


def _temperature(row: Row) -> str:
    return f"{compact(row.temperature)}{' nominal' if row.nominal and row.temperature is not None else ''}"
