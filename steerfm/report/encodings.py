"""What all plots share, in Vega-Lite: colours, marks, axes, points with error bars and tooltips."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steerfm.report.columns import compact, interval, number
from steerfm.report.estimates import Estimate
from steerfm.report.rows import Row

Specification = dict[str, Any]
Get = Callable[[Row], "Estimate | float | None"]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # its name; nothing is loaded
VERSION = "6.4"
STYLES = 8  # different colours, and different marks
MARK_SIZE = 190.0

COLOURS = {
    False: ("#616870", "#0072b2", "#c8500a", "#00805c", "#aa3377", "#8f6400", "#4b3fa8", "#b8336a"),
    True: ("#a8b0bc", "#56b4e9", "#ff8f52", "#3ccb9f", "#e58bc0", "#ecc14a", "#a9a0ff", "#ff9fb8"),
}
INKS = {False: ("#1c1f23", "#5d636b", "#e3e4e1"), True: ("#e8e9ea", "#a0a6ae", "#2c3036")}  # ink, soft, grid
# marks of about one area around (0, 0), 14 across, told apart without colour
MARKS = (
    "M6 0C6 3.31 3.31 6 0 6C-3.31 6 -6 3.31 -6 0C-6 -3.31 -3.31 -6 0 -6C3.31 -6 6 -3.31 6 0Z",
    "M-5.3 -5.3H5.3V5.3H-5.3Z",
    "M0 -7L6.6 5H-6.6Z",
    "M0 -7.4L7.4 0L0 7.4L-7.4 0Z",
    "M0 7L6.6 -5H-6.6Z",
    "M-2.3 -6.8H2.3V-2.3H6.8V2.3H2.3V6.8H-2.3V2.3H-6.8V-2.3H-2.3Z",
    "M0 -7L6.7 -2.2L4.1 5.7H-4.1L-6.7 -2.2Z",
    "M0 -8L2 -2.7L7.6 -2.5L3.2 1L4.7 6.5L0 3.3L-4.7 6.5L-3.2 1L-7.6 -2.5L-2 -2.7Z",
)


@dataclass(frozen=True)
class Axis:
    """Hold what an axis shows: its title, its figure, whether less of it is better, its bounds, and a note."""

    title: str
    get: Get
    less_is_better: bool = False
    logarithmic: bool = False
    bounds: tuple[float, float] | None = None
    note: str = ""


def mark_style(index: int) -> int:
    """Return which colour the index-th run has."""
    return index % STYLES


def mark_path(index: int) -> str:
    """Return the outline of the index-th run's mark; colour and mark together stay unique far beyond eight runs."""
    return MARKS[(index + index // STYLES) % STYLES]


def theme(dark: bool) -> Specification:
    """Return Vega's configuration: the page's colours and type, light or dark."""
    ink, soft, grid = INKS[dark]
    return {
        "background": "transparent",
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
        "range": {"category": list(COLOURS[dark])},
        "axis": {
            "labelColor": soft, "titleColor": ink, "gridColor": grid, "domainColor": soft, "tickColor": soft,
            "labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "titlePadding": 8, "labelPadding": 5,
        },
        "title": {"color": ink, "fontSize": 14, "fontWeight": 600, "anchor": "start", "offset": 10},
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 13},
        "view": {"stroke": "transparent"},
        "rule": {"color": soft},
        "style": {"frontier": {"color": soft}, "baseline": {"color": ink}},
    }  # fmt: skip


def png(specification: Specification, scale: float = 2.0) -> bytes:
    """Draw a specification as a PNG."""
    import vl_convert

    return vl_convert.vegalite_to_png(specification, vl_version=VERSION, scale=scale)


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between low and high, with 2 and 5 times them (or more) where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            return [float(f"{value:.6g}") for value in found]
    return []


def powers_of_four(low: float, high: float) -> list[float]:
    """Return the powers of four between low and high, the usual ticks where that makes fewer than three or many."""
    found = [4.0**p for p in range(math.ceil(math.log(low, 4)), math.floor(math.log(high, 4)) + 1)]
    return found if 3 <= len(found) <= 10 else log_ticks(low, high)


def cost_axis(title: str, costs: Sequence[float]) -> Specification:
    """Return the horizontal axis of costs: by logarithm unless one of them is zero."""
    low, high = min(costs, default=0.0), max(costs, default=0.0)
    if low <= 0:
        return {"title": title, "scale": {"domain": [low, high * 1.05 or 1.0], "nice": False}}
    room = max((high / low) ** 0.07, 1.25)
    low, high = low / room, high * room
    axis = {"values": powers_of_four(low, high) if low >= 0.1 else log_ticks(low, high), "format": ",.12~g"}
    return {
        "title": f"{title}, log scale",
        "scale": {"type": "log", "domain": [low, high], "nice": False},
        "axis": {key: value for key, value in axis.items() if value},
    }


def held_out_axis(name: str, probability: bool) -> Axis:
    """Return the axis of a held-out value."""
    note = "Reward that rises while the held-out value falls is being hacked."
    return Axis(
        f"{name}, held out", lambda row: row.held_out.get(name), bounds=(0.0, 1.0) if probability else None, note=note
    )


def point(label: str, reward: Estimate, x: Estimate | float) -> dict[str, Any]:
    """Return one run's point: its place, the ends of its intervals, and the words of its tooltip."""
    place = x.mean if isinstance(x, Estimate) else x
    left, right = (x.low, x.high) if isinstance(x, Estimate) else (None, None)
    return {
        "run": label,
        "x": place,
        "y": reward.mean,
        "y_low": reward.mean if reward.low is None else reward.low,
        "y_high": reward.mean if reward.high is None else reward.high,
        "x_low": place if left is None else left,
        "x_high": place if right is None else right,
        "reward": written(reward),
        "value": written(x),
    }


def written(found: Estimate | float) -> str:
    """Return a figure with its interval."""
    if not isinstance(found, Estimate):
        return compact(found)
    return f"{number(found.mean)}, {interval(found)}" if interval(found) else number(found.mean)


def marks_of(labels: Sequence[str]) -> Specification:
    """Return the encoding of a run: its colour, of the theme's, and its mark."""
    shapes = [mark_path(i) for i in range(len(labels))]
    return {
        "color": {"field": "run", "type": "nominal", "legend": None, "scale": {"domain": list(labels)}},
        "shape": {
            "field": "run",
            "type": "nominal",
            "legend": None,
            "scale": {"domain": list(labels), "range": [_unit(path) for path in shapes]},
        },
    }


def _unit(path: str) -> str:
    """Return a mark's outline within about -1..1, which is what Vega scales."""
    return re.sub(r"-?\d+(\.\d+)?", lambda found: f"{float(found[0]) / 7:.3f} ", path)


def quantitative(field: str, axis: Specification) -> Specification:
    """Return the encoding of a number on an axis."""
    return {"field": field, "type": "quantitative", **axis}


def bars(along: str, other: str, x: Specification, y: Specification, labels: Sequence[str]) -> Specification:
    """Return the error bars along an axis."""
    places = {"x": x, "y": y}
    return {
        "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.8, "aria": False},
        "encoding": {
            along: quantitative(f"{along}_low", places[along]),
            f"{along}2": {"field": f"{along}_high"},
            other: quantitative(other, places[other]),
            "color": marks_of(labels)["color"],
        },
    }


def dots(
    x: Specification, y: Specification, labels: Sequence[str], tooltip: Sequence[tuple[str, str]]
) -> Specification:
    """Return the marks, with a tooltip of (field, title)."""
    return {
        "mark": {"type": "point", "filled": True, "size": MARK_SIZE, "opacity": 1, "style": "dot"},
        "encoding": {
            "x": quantitative("x", x),
            "y": quantitative("y", y),
            **marks_of(labels),
            "tooltip": [{"field": field, "type": "nominal", "title": head} for field, head in tooltip],
        },
    }


def with_legend(view: Specification, legend: Specification) -> Specification:
    """Return a layered view whose marks have a legend."""

    def shown(layer: Specification) -> Specification:
        encoding = {
            name: {**value, "legend": legend} if name in ("color", "shape") else value
            for name, value in layer["encoding"].items()
        }
        return {**layer, "encoding": encoding}

    return {**view, "layer": [shown(layer) for layer in view["layer"]]}
