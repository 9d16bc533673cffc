"""A comparison as one HTML file that asks nothing of any network: tables, plots, pictures, recipes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from steerfm.report import charts
from steerfm.report.columns import Column, columns, difference_text, differences, interval, number
from steerfm.report.compare import Comparison
from steerfm.report.curves import curves, described
from steerfm.report.pictures import chosen_pairs, data_uri, is_tiny, read_picture, rows_by_pair
from steerfm.report.rows import Row
from steerfm.report.sources import Source

POINT_QUANTILES = (0.005, 0.995)  # what a scatter plot shows, so that one stray point does not shrink the rest


@dataclass(frozen=True)
class Shot:
    """Hold one picture of a strip: its data URI ("" where there is none), alternative text and caption."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Strip:
    """Hold one run's pictures for one prompt, in the order of the seeds."""

    index: int
    label: str
    shots: list[Shot]


@dataclass(frozen=True)
class Gallery:
    """Hold the strips of all runs for one prompt."""

    prompt: str
    seeds: list[int]
    strips: list[Strip]


def page(comparison: Comparison, title: str = "") -> str:
    """Return the page. Prompts, labels and everything else read from runs are escaped; no script but ours can run."""
    style, script = _asset("style.css"), _asset("sort.js")
    galleries, tiny = _galleries(comparison)
    count = len(comparison.sources)
    return (
        _environment()
        .get_template("compare.html")
        .render(
            title=title or f"Comparison of {count} {_plural(count, 'run')}",
            summary=_summary(comparison),
            comparison=comparison,
            **_tables(comparison),
            charts=[] if comparison.lines else charts.charts(comparison),
            curves=_curves(comparison),
            scatters=_scatters(comparison),
            geometry=charts,
            galleries=galleries,
            tiny=tiny,
            recipes=[(source, _yaml(source.config)) for source in comparison.sources],
            interval=interval,
            style=Markup(style),  # both files are ours
            script=Markup(script),
            style_hash=_csp_hash(style),
            script_hash=_csp_hash(script),
        )
    )


def _tables(comparison: Comparison) -> dict[str, Any]:
    """Return what the two tables show; the index of a run decides its mark."""
    shown = columns(comparison)
    indices = {source.label: i for i, source in enumerate(comparison.sources)}
    figures, changes = differences(comparison)
    rows = [(row, indices.get(row.label) if row.kind == "run" else None) for row in comparison.rows]
    return {
        "columns": shown,
        "rows": [(row, index, _cells(row, shown)) for row, index in rows],
        "figures": [figure.removeprefix("held_out.") for figure in figures],
        "changes": [
            (indices[label], label, [(pair, difference_text(pair)) for pair in pairs]) for label, pairs in changes
        ],
    }


def _curves(comparison: Comparison) -> Shot | None:
    """Return the picture of the lines, where there are any."""
    if not comparison.lines:
        return None
    uri = f"data:image/png;base64,{base64.b64encode(curves(comparison)).decode('ascii')}"
    return Shot(uri, described(comparison.lines), "")


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("steerfm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mark"] = charts.mark_path
    environment.filters["colour"] = charts.mark_style
    return environment


def _asset(name: str) -> str:
    return resources.files("steerfm.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """Return what a content security policy calls an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _summary(comparison: Comparison) -> str:
    """Return what was compared, in one line."""
    counts = sorted({len(source.rows) for source in comparison.sources})
    each = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    prompts = sum(bool(prompt) for prompt in comparison.prompts)
    asked = f", {prompts:,} {_plural(prompts, 'prompt')}" if prompts else ""
    held = f"; differences are to {comparison.sources[0].label}" if len(comparison.sources) > 1 else ""
    return f"{each} samples a run{asked}{held}."


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _cells(row: Row, shown: list[Column]) -> list[dict[str, Any]]:
    """Return what stands in a row of the table: text, what is written small after it, sort key, and a longer text."""
    cells = []
    for column in shown:
        main, _, small = column.text(row).partition(" ")
        split = column.numeric and bool(small)
        value = column.value(row)
        cells.append(
            {
                "text": main if split else column.text(row),
                "small": small if split else "",
                "sort": "" if value is None else value,
                "detail": column.detail(row),
                "numeric": column.numeric,
            }
        )
    return cells


def _galleries(comparison: Comparison) -> tuple[list[Gallery], bool]:
    """Return the pictures prompt by prompt, and whether they are tiny; none where no run has a picture."""
    places = [rows_by_pair(source) for source in comparison.sources]
    galleries, seen = [], []
    for prompt, seeds in chosen_pairs(comparison).items():
        strips = []
        for i, source in enumerate(comparison.sources):
            shots = []
            for seed in seeds:
                place = places[i].get((prompt, seed))
                pixels = None if place is None else read_picture(source.samples.picture(place))
                seen += [] if pixels is None else [pixels]
                shots.append(_shot(source, prompt, seed, place, pixels))
            strips.append(Strip(i, source.label, shots))
        galleries.append(Gallery(prompt, seeds, strips))
    return (galleries, is_tiny(seen)) if seen else ([], False)


def _shot(source: Source, prompt: str, seed: int, place: int | None, pixels: np.ndarray | None) -> Shot:
    """Return one picture with its words."""
    reward = None if place is None else source.rows[place].get("reward")
    scored = "" if reward is None else f", reward {number(reward)}"
    alt = f"{source.label}, “{prompt}”, seed {seed}{scored}"
    return Shot(data_uri(pixels) if pixels is not None else "", alt, "" if reward is None else number(reward))


def _scatters(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a scatter plot for every run of two-dimensional points, over the reference's points; else nothing."""
    flat = [source for source in comparison.sources if _is_planar(source.x0)]
    every = [x for source in flat for x in (source.x0, source.reference) if x is not None and _is_planar(x)]
    if not every:
        return []
    together = torch.cat(every)
    together = together[together.isfinite().all(1)].double()
    low, high = (together.quantile(q, dim=0).tolist() for q in POINT_QUANTILES)
    room = 0.06 * max(top - bottom for top, bottom in zip(high, low, strict=True))
    low, high = [v - room for v in low], [v + room for v in high]
    return [
        {
            "index": comparison.sources.index(source),
            "label": source.label,
            "points": charts.scatter(source.x0, low, high) if source.x0 is not None else [],
            "reference": charts.scatter(source.reference, low, high) if source.reference is not None else [],
        }
        for source in flat
    ]


def _is_planar(x: Tensor | None) -> bool:
    return x is not None and x.ndim == 2 and x.shape[1] == 2
