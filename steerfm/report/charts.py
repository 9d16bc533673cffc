"""Plots as plain geometry: where the points, error bars and ticks of a chart lie; the page's template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from steerfm.report.columns import compact, interval, is_probability, number
from steerfm.report.compare import Comparison
from steerfm.report.estimates import Estimate
from steerfm.report.rows import Row

WIDTH, HEIGHT = 480, 340  # of a chart's drawing area, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 14, 52  # margins
PANEL = 150  # the side of one scatter plot
STYLES = 8  # different colours, and different marks
MOST_POINTS = 600  # of one scatter plot

COST_TITLES = {
    "network_calls": "network calls per sample",
    "reward_calls": "reward calls per sample",
    "reward_gradients": "reward gradients per sample",
    "seconds": "seconds per sample",
}
# marks of about one area around (0, 0), told apart without colour
MARKS = (
    "M6 0A6 6 0 1 1 -6 0A6 6 0 1 1 6 0Z",
    "M-5.3 -5.3H5.3V5.3H-5.3Z",
    "M0 -7L6.6 5H-6.6Z",
    "M0 -7.4L7.4 0L0 7.4L-7.4 0Z",
    "M0 7L6.6 -5H-6.6Z",
    "M-2.3 -6.8H2.3V-2.3H6.8V2.3H2.3V6.8H-2.3V2.3H-6.8V-2.3H-2.3Z",
    "M0 -7L6.7 -2.2L4.1 5.7H-4.1L-6.7 -2.2Z",
    "M0 -8L2 -2.7L7.6 -2.5L3.2 1L4.7 6.5L0 3.3L-4.7 6.5L-3.2 1L-7.6 -2.5L-2 -2.7Z",
)


@dataclass(frozen=True)
class Tick:
    """Hold a tick's place in SVG units and its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Mark:
    """Hold one run's mark in a chart: its place and error bars in SVG units, its style, and what it says."""

    style: int
    x: float
    y: float
    across: tuple[float, float] | None
    upright: tuple[float, float] | None
    text: str


@dataclass(frozen=True)
class Chart:
    """Hold a chart that is ready to be drawn."""

    title: str
    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """Map values to SVG units between `start` and `end`, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, rounded to a tenth."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[Tick]:
        """Return a few ticks at round values inside the axis."""
        values = log_ticks(self.low, self.high) if self.logarithmic else round_ticks(self.low, self.high)
        return [Tick(self.place(value), compact(value)) for value in values]


def mark_style(index: int) -> int:
    """Return which colour the index-th run has."""
    return index % STYLES


def mark_path(index: int) -> str:
    """Return the outline of the index-th run's mark; colour and mark together stay unique far beyond eight runs."""
    return MARKS[(index + index // STYLES) % STYLES]


def charts(comparison: Comparison) -> list[Chart]:
    """Return reward against cost, then each held-out value against reward; those without a point are left out."""
    rows = [row for row in comparison.rows if row.kind == "run"]
    found = [reward_chart(rows, comparison.x), *(held_out_chart(rows, name) for name in comparison.held_out)]
    return [chart for chart in found if chart.marks]


def reward_chart(rows: Sequence[Row], cost: str) -> Chart:
    """Return the chart of reward against a cost; the cost's axis is logarithmic unless one of them is zero."""
    known = [(i, row, row.reward, row.costs[cost]) for i, row in enumerate(rows) if row.reward and cost in row.costs]
    x = _cost_axis([place for *_, place in known])
    y = _axis([found for _, _, found, _ in known], HEIGHT - BOTTOM, TOP)
    marks = [
        Mark(
            i, x.place(place), y.place(found.mean), None, _bar(found, y),
            f"{row.label}: reward {number(found.mean)} at {compact(place)} {COST_TITLES[cost]}; {interval(found)}",
        )
        for i, row, found, place in known
    ]  # fmt: skip
    tuned = any(row.tuning_seconds for row in rows)
    return Chart(
        title="Reward against cost",
        x_title=COST_TITLES[cost] + (", log scale" if x.logarithmic else ""),
        y_title="reward, mean",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        marks=marks,
        note="Fine-tuning itself is paid once and not part of this cost; the table has it." if tuned else "",
    )


def held_out_chart(rows: Sequence[Row], name: str) -> Chart:
    """Return the chart of a held-out value against reward: where it falls while reward rises, the reward is hacked."""
    known = [(i, r, r.reward, r.held_out[name]) for i, r in enumerate(rows) if r.reward and name in r.held_out]
    x = _axis([reward for _, _, reward, _ in known], LEFT, WIDTH - RIGHT)
    y = _axis(
        [judged for *_, judged in known], HEIGHT - BOTTOM, TOP, (0.0, 1.0) if is_probability(rows, name) else None
    )
    marks = [
        Mark(
            i, x.place(reward.mean), y.place(judged.mean), _bar(reward, x), _bar(judged, y),
            f"{row.label}: {name} {number(judged.mean)}, {interval(judged)}; reward {number(reward.mean)}",
        )
        for i, row, reward, judged in known
    ]  # fmt: skip
    return Chart(
        title=f"{name}, held out, against reward",
        x_title="reward, mean",
        y_title=f"{name}, mean",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        marks=marks,
        note="Reward that rises while the held-out value falls is being hacked.",
    )


def scatter(x0: Tensor, low: Sequence[float], high: Sequence[float]) -> list[tuple[float, float]]:
    """Return the first points (N, 2) as places in a square of side `PANEL`, y upward; those outside are left out."""
    side = max(high[0] - low[0], high[1] - low[1]) or 1.0
    unit = [((x - low[0]) / side, 1 - (y - low[1]) / side) for x, y in x0[:MOST_POINTS].tolist()]
    return [(round(x * PANEL, 1), round(y * PANEL, 1)) for x, y in unit if 0 <= x <= 1 and 0 <= y <= 1]


def round_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between low and high, about so many."""
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs((high - low) / size - about))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [float(f"{(first + i) * step:.12g}") for i in range(count)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between low and high, with 2 and 5 times them (or more) where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            return found
    return round_ticks(low, high)


def _cost_axis(values: Sequence[float]) -> Axis:
    """Return the axis of a cost, with some room on both sides."""
    if not values:
        return Axis(0, 1, LEFT, WIDTH - RIGHT)
    low, high = min(values), max(values)
    if low > 0:
        room = max((high / low) ** 0.07, 1.25)
        return Axis(low / room, high * room, LEFT, WIDTH - RIGHT, logarithmic=True)
    return Axis(-0.05 * (high or 1), 1.05 * (high or 1), LEFT, WIDTH - RIGHT)


def _axis(found: Sequence[Estimate], start: float, end: float, bounds: tuple[float, float] | None = None) -> Axis:
    """Return a linear axis that holds means and intervals with some room, or just the bounds."""
    values = [v for e in found for v in (e.mean, e.low, e.high) if v is not None] or [0.0, 1.0]
    low, high = bounds or (min(values), max(values))
    room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room * (0.4 if bounds else 1), high + room * (0.4 if bounds else 1), start, end)


def _bar(found: Estimate, axis: Axis) -> tuple[float, float] | None:
    """Return the ends of an error bar."""
    if found.low is None or found.high is None:
        return None
    return axis.place(found.low), axis.place(found.high)
