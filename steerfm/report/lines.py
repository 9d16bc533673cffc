"""Methods at several costs: a line a method, a column a group of them, reward above what was held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steerfm.report.columns import COST_NAMES
from steerfm.report.compare import Comparison, Line
from steerfm.report.encodings import (
    SCHEMA,
    Axis,
    Specification,
    bars,
    cost_axis,
    dots,
    held_out_axis,
    marks_of,
    point,
    quantitative,
    theme,
    with_legend,
)
from steerfm.report.estimates import Estimate
from steerfm.report.rows import Row

WIDTH, HEIGHT = 330, 230  # of one panel, in pixels


class Place(NamedTuple):
    """Say where a panel stands: whether it has an axis at its left and below, and what stands above it."""

    leftmost: bool
    lowest: bool
    title: str


def lines(comparison: Comparison) -> Specification:
    """Return methods at several costs: a line a method, a column a group of them, reward above what was held out.

    The columns share their axes. Dashed: the first run, which the others are held against. Runs that lack the cost or
    the value are left out.
    """
    rows = {row.label: row for row in comparison.rows if row.kind == "run"}
    first = comparison.sources[0].label
    named = dict.fromkeys([*(label for line in comparison.lines for label in line.runs), first])
    drawn = [rows[label] for label in named if comparison.x in rows[label].costs]
    shown = [Axis("reward", lambda row: row.reward), *(held_out_axis(name, False) for name in comparison.held_out)]
    shown = [axis for axis in shown if any(axis.get(row) is not None for row in drawn)]
    cost = cost_axis(f"{COST_NAMES[comparison.x]} per sample", [row.costs[comparison.x] for row in drawn])
    groups = {
        line.group: [other for other in comparison.lines if other.group == line.group] for line in comparison.lines
    }
    panels = []
    for row, axis in enumerate(shown):
        for column, (group, members) in enumerate(groups.items()):
            place = Place(column == 0, row == len(shown) - 1, group if row == 0 else "")
            panels.append(_panel(members, rows, rows[first], comparison.x, cost, axis, _domain(axis, drawn), place))
    return {
        "$schema": SCHEMA,
        "title": {"text": f"dashed: {first}", "fontSize": 12, "fontWeight": "normal"},
        "concat": panels,
        "columns": len(groups),
        "align": "each",
        "spacing": 18,
        "config": {**theme(dark=False), "background": "#ffffff"},
        "resolve": {"scale": {"color": "independent", "shape": "independent"}},
    }


def described(lines: Sequence[Line]) -> str:
    """Return what the picture of lines shows in words, for who cannot see it; the figures are the table's."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line.label)
    return "; ".join(f"{group}: {', '.join(labels)}" for group, labels in groups.items())


def _domain(axis: Axis, rows: Sequence[Row]) -> tuple[float, float]:
    """Return the ends of a vertical axis that holds all means and intervals with some room."""
    found = [value for row in rows if isinstance(value := axis.get(row), Estimate)]
    values = [v for each in found for v in (each.mean, each.low, each.high) if v is not None]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _panel(
    members: Sequence[Line],
    rows: dict[str, Row],
    first: Row,
    cost: str,
    across: Specification,
    axis: Axis,
    domain: tuple[float, float],
    place: Place,
) -> Specification:
    """Return one panel of lines: a group's methods in one figure."""
    values = [
        {**point(line.label, found, rows[label].costs[cost]), "at": label}
        for line in members
        for label in line.runs
        if cost in rows[label].costs and isinstance(found := axis.get(rows[label]), Estimate)
    ]
    labels = [line.label for line in members]
    x = {**across, "title": across["title"] if place.lowest else None}
    if not place.lowest:
        x["axis"] = {**across.get("axis", {}), "labels": False}
    y = {"title": axis.title if place.leftmost else None, "scale": {"domain": list(domain), "nice": False}}
    y["axis"] = {"tickCount": 6, "labels": place.leftmost}
    legend = {
        "orient": "bottom",
        "columns": 1,
        "title": None,
        "labelLimit": WIDTH,
        "symbolSize": 90,
        "symbolOpacity": 1,
    }
    tooltip = [("run", "method"), ("at", "run"), ("reward", axis.title), ("value", across["title"])]
    join = {
        "mark": {"type": "line", "strokeWidth": 1.8},
        "encoding": {
            "x": quantitative("x", x),
            "y": quantitative("y", y),
            "color": marks_of(labels)["color"],
            "order": {"field": "x"},
        },
    }
    base = axis.get(first)
    dashed = {
        "data": {"values": [{"y": base.mean, "said": first.label}] if isinstance(base, Estimate) else []},
        "mark": {"type": "rule", "strokeDash": [5, 3], "style": "baseline"},
        "encoding": {"y": quantitative("y", y), "tooltip": {"field": "said", "type": "nominal", "title": "run"}},
    }
    for layer in (dashed, join):
        layer["mark"]["aria"] = False  # what they say the marks say
    layers = [dashed, bars("y", "x", x, y, labels), join, dots(x, y, labels, tooltip)]
    view = {"width": WIDTH, "height": HEIGHT, "data": {"values": values}, "layer": layers}
    if place.title:
        view["title"] = {"text": place.title, "anchor": "middle", "frame": "group"}
    return with_legend(view, legend) if place.lowest else view
