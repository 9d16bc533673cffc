"""A comparison as one HTML file that loads nothing from elsewhere; every text in it is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

import torch
import vl_convert
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from steerfm.report import charts, encodings
from steerfm.report.columns import Column, columns, difference_text, differences, interval
from steerfm.report.compare import Comparison
from steerfm.report.conclusions import meaning
from steerfm.report.lines import described, lines
from steerfm.report.rows import Row
from steerfm.report.settings import different_settings
from steerfm.report.viewer import gallery

POINT_QUANTILES = (0.005, 0.995)  # what a scatter plot shows, so that one stray point does not shrink the rest
SCRIPTS = ("sort.js", "theme.js", "viewer.js", "charts.js")


def page(comparison: Comparison, title: str = "") -> str:
    """Return the page. Prompts, labels and everything else read from runs are escaped; no script but ours can run."""
    style, script = _asset("style.css"), "\n".join(_asset(name) for name in SCRIPTS)
    plots = [] if comparison.lines else charts.charts(comparison)
    scatters = _scatters(comparison)
    drawn = {f"chart-{i}": {**plot.specification, "width": "container"} for i, plot in enumerate(plots)}
    drawn |= {"lines": lines(comparison)} if comparison.lines else {}
    drawn |= {f"points-{i}": found for i, (_, _, found) in enumerate(scatters)}
    samples = gallery(comparison)
    vega = _vega() if drawn else ""
    count = len(comparison.sources)
    return (
        _environment()
        .get_template("compare.html")
        .render(
            title=title or f"Comparison of {count} {_plural(count, 'run')}",
            summary=_summary(comparison),
            comparison=comparison,
            conclusions=comparison.conclusions,
            meaning=meaning(comparison),
            **_tables(comparison),
            charts=plots,
            lines_text=described(comparison.lines),
            scatters=scatters,
            samples=samples,
            samples_data=_data(samples) if samples else "",
            charts_data=_data({"charts": drawn, "light": encodings.theme(False), "dark": encodings.theme(True)}),
            settings=different_settings(comparison.sources),
            recipes=[(source, _yaml(source.config)) for source in comparison.sources],
            interval=interval,
            style=Markup(style),  # these files are ours, or Vega's
            script=Markup(script),
            vega=Markup(vega),
            style_hash=_csp_hash(style),
            script_hashes=[_csp_hash(text) for text in (script, vega) if text],
        )
    )


@cache
def _vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, with the function that draws a chart without eval."""
    bundle = vl_convert.javascript_bundle(_asset("embed.js"), vl_version=encodings.VERSION)
    if "</script" in bundle.lower():
        raise ValueError("Vega's bundle holds '</script', which would end the script that holds it.")
    return bundle


def _data(value: Any) -> Markup:
    """Return JSON that may stand inside a script element: no text in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


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
    environment.filters["mark"] = encodings.mark_path
    environment.filters["colour"] = encodings.mark_style
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


def _scatters(comparison: Comparison) -> list[tuple[int, str, dict[str, Any]]]:
    """Return (index, label, plot) of every run of two-dimensional points, over the reference's points; else nothing."""
    flat = [(i, source) for i, source in enumerate(comparison.sources) if _is_planar(source.x0)]
    every = [x for _, source in flat for x in (source.x0, source.reference) if x is not None and _is_planar(x)]
    if not every:
        return []
    together = torch.cat(every)
    together = together[together.isfinite().all(1)].double()
    if not len(together):
        return []
    low, high = (together.quantile(q, dim=0).tolist() for q in POINT_QUANTILES)
    room = 0.06 * max(top - bottom for top, bottom in zip(high, low, strict=True))
    low, high = [v - room for v in low], [v + room for v in high]
    return [(i, source.label, charts.scatter(source.x0, source.reference, low, high, i)) for i, source in flat]


def _is_planar(x: Tensor | None) -> bool:
    return x is not None and x.ndim == 2 and x.shape[1] == 2
