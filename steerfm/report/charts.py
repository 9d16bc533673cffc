"""What is plotted, as Vega-Lite specifications: for the page, for notebooks, and to be drawn as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from steerfm.report.columns import COST_NAMES, is_probability
from steerfm.report.compare import Comparison
from steerfm.report.encodings import (
    COLOURS,
    SCHEMA,
    Axis,
    Specification,
    bars,
    cost_axis,
    dots,
    held_out_axis,
    mark_style,
    point,
    quantitative,
    theme,
    with_legend,
)
from steerfm.report.estimates import Estimate
from steerfm.report.lines import lines
from steerfm.report.rows import Row

WIDTH, HEIGHT = 400, 280  # of a chart's drawing area, in pixels
SQUARE = 170  # the side of one scatter plot
MOST_POINTS = 600  # of one scatter plot
HIDDEN = "hidden"  # the parameter that holds the labels of runs that are switched off


@dataclass(frozen=True)
class Chart:
    """Hold a chart: its title, a note for the reader, what it says in words, and its specification."""

    title: str
    note: str
    text: str
    specification: Specification


def charts(comparison: Comparison) -> list[Chart]:
    """Return reward against cost, held-out values, diversity and divergence; those without two runs are left out."""
    rows = [row for row in comparison.rows if row.kind == "run"]
    return [chart for axis in axes(comparison) if (chart := _pareto(rows, axis)) is not None]


def axes(comparison: Comparison) -> list[Axis]:
    """Return what the reward is plotted against."""
    rows = [row for row in comparison.rows if row.kind == "run"]
    cost = comparison.x
    costs = [row.costs[cost] for row in rows if cost in row.costs]
    ratio = any(row.diversity_ratio is not None for row in rows)
    spread = "diversity, share of the real data's" if ratio else "diversity, mean pairwise distance"
    paid = "Fine-tuning itself is paid once and not part of this cost; the table has it."
    note = paid if any(row.tuning_seconds for row in rows) else ""
    return [
        Axis(
            f"{COST_NAMES[cost]} per sample",
            lambda row: row.costs.get(cost),
            True,
            min(costs, default=0) > 0,
            note=note,
        ),
        *(held_out_axis(name, is_probability(rows, name)) for name in comparison.held_out),
        Axis(spread, lambda row: row.diversity_ratio if ratio else row.diversity),
        Axis("divergence D from the base, nats", lambda row: row.divergence, less_is_better=True),
    ]


def specification(comparison: Comparison, columns: int = 2) -> Specification:
    """Return all charts, or the lines where there are any, as one Vega-Lite specification with its colours."""
    if comparison.lines:
        return lines(comparison)
    legend = {
        "orient": "bottom",
        "columns": columns,
        "title": None,
        "labelLimit": 320,
        "symbolSize": 90,
        "symbolOpacity": 1,
    }
    views = []
    for chart in charts(comparison):
        view = {key: value for key, value in chart.specification.items() if key not in ("$schema", "params")}
        views.append({"title": chart.title, **with_legend(view, legend)})
    return {
        "$schema": SCHEMA,
        "params": [_hidden()],
        "concat": views,
        "columns": columns,
        "spacing": 28,
        "config": {**theme(dark=False), "background": "#ffffff"},
        "resolve": {"scale": {"color": "shared", "shape": "shared", "x": "independent"}},
    }


def scatter(
    x0: Tensor | None, reference: Tensor | None, low: Sequence[float], high: Sequence[float], index: int
) -> Specification:
    """Return a scatter plot of the first points (N, 2) over the reference's, in the index-th run's colour."""
    side = max(high[0] - low[0], high[1] - low[1]) or 1.0
    found = [
        {"x": round(x, 4), "y": round(y, 4), "ours": ours}
        for ours, points in ((False, reference), (True, x0))
        for x, y in (points[:MOST_POINTS].tolist() if points is not None else ())
        if 0 <= x - low[0] <= side and 0 <= y - low[1] <= side
    ]
    places = {name: {"domain": [start, start + side]} for name, start in zip("xy", low, strict=True)}
    return {
        "$schema": SCHEMA,
        "width": SQUARE,
        "height": SQUARE,
        "data": {"values": found},
        "mark": {"type": "circle", "size": 6, "opacity": 0.7},
        "encoding": {
            **{name: quantitative(name, {"axis": None, "scale": scale}) for name, scale in places.items()},
            "color": {
                "field": "ours",
                "type": "nominal",
                "legend": None,
                "scale": {"domain": [False, True], "range": ["#8a9099", COLOURS[False][mark_style(index)]]},
            },
        },
    }


def _pareto(rows: Sequence[Row], axis: Axis) -> Chart | None:
    """Return the chart of reward against an axis, with the runs that no other beats in both joined by a step."""
    known = [(row, row.reward, x) for row in rows if row.reward is not None and (x := axis.get(row)) is not None]
    if len(known) < 2:
        return None
    values = [point(row.label, reward, x) for row, reward, x in known]
    places, labels = [each["x"] for each in values], [row.label for row in rows]
    across = cost_axis(axis.title, places) if axis.logarithmic else _value_axis(axis.title, axis.bounds)
    upright = _value_axis("reward, mean")
    layers = [bars("y", "x", across, upright, labels)]
    if any(isinstance(x, Estimate) for *_, x in known):
        layers.append(bars("x", "y", across, upright, labels))
    if min(places) < max(places):
        layers.insert(0, _frontier(axis.less_is_better, across, upright))
    return Chart(
        title=f"Reward against {axis.title.removesuffix(' per sample').split(',')[0]}",
        note=axis.note,
        text=" ".join(f"{each['run']}: reward {each['reward']}, {axis.title} {each['value']}." for each in values),
        specification={
            "$schema": SCHEMA,
            "width": WIDTH,
            "height": HEIGHT,
            "params": [_hidden()],
            "data": {"values": values},
            "transform": [{"filter": f"indexof({HIDDEN}, datum.run) < 0"}],
            "layer": [
                *layers,
                dots(across, upright, labels, [("run", "run"), ("reward", "reward"), ("value", axis.title)]),
            ],
        },
    )


def _value_axis(title: str, bounds: tuple[float, float] | None = None) -> Specification:
    """Return an axis of means, with room for their marks."""
    scale = {"zero": False, "nice": False, "padding": 16} | ({"domain": list(bounds)} if bounds else {})
    return {"title": title, "scale": scale, "axis": {"tickCount": 6}}


def _hidden() -> Specification:
    return {"name": HIDDEN, "value": []}


def _frontier(less_is_better: bool, x: Specification, y: Specification) -> Specification:
    """Return the step through the runs that are best in reward among all that are as good on the axis."""
    order = "ascending" if less_is_better else "descending"
    return {
        "transform": [
            {
                "window": [{"op": "max", "field": "y", "as": "best"}],
                "sort": [{"field": "x", "order": order}, {"field": "y", "order": "descending"}],
                "frame": [None, 0],
            },
            {"filter": "datum.y >= datum.best"},
        ],
        "mark": {
            "type": "line",
            "interpolate": "step-after" if less_is_better else "step-before",
            "strokeDash": [3, 3],
            "strokeWidth": 1.2,
            "style": "frontier",
            "aria": False,
        },
        "encoding": {"x": quantitative("x", x), "y": quantitative("y", y), "order": {"field": "x"}},
    }
