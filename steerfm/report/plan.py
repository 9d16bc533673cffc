"""What a comparison's W&B Report says and shows, as plain data that can be kept, read and published later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steerfm.report.artifacts import read_record
from steerfm.report.columns import COST_NAMES
from steerfm.report.compare import Comparison
from steerfm.report.conclusions import meaning
from steerfm.report.rows import Row
from steerfm.report.settings import different_settings
from steerfm.report.sources import Source
from steerfm.report.terminal import markdown

MOST_SETTINGS = 40
NO_SETTING = ("name", "label", "folder", "inputs", "logger", "threads")  # that say where and how, not what was run


def plan(comparison: Comparison, run: Mapping[str, str], title: str = "") -> dict[str, Any]:
    """Return the Report: title, and its blocks in order.

    run: the comparison's own W&B run, by `run` (its id), `project` and `entity`. A block is a heading, a text in
    Markdown, or panels with the runs that they show; see `published.blocks`. Each compared run that is in W&B too, or
    each line of such runs, is a run set of its own.
    """
    own = {"name": "comparison", "ids": [run["run"]], "project": "", "entity": ""}
    runs = [own, *run_sets(comparison)]
    labels = ", ".join(source.label for source in comparison.sources)
    return {
        "title": (title or f"Comparison: {labels}")[:128],
        "description": f"{len(comparison.sources)} runs against {COST_NAMES[comparison.x]}, first: {labels}",
        **run,
        "blocks": [
            _heading("Summary"),
            _text(markdown(comparison)),
            _heading("Figures"),
            {"kind": "panels", "runs": runs, "panels": _figures(comparison, len(runs) > 1)},
            _heading("The same prompts and seeds"),
            {"kind": "panels", "runs": [own], "panels": _pictures(comparison)},
            _heading(f"Reward against {COST_NAMES[comparison.x]}"),
            _text(_pareto_text(comparison)),
            {"kind": "panels", "runs": [own], "panels": [_scatter(comparison)]},
            _heading("Settings"),
            _text(settings(comparison.sources)),
            _heading("Conclusions"),
            _text("\n".join(f"- {said}" for said in [*comparison.conclusions, meaning(comparison)])),
        ],
    }


def run_sets(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the compared runs that are in W&B: a set a line where lines were given, and a set each of the others."""
    records = {source.label: read_record(source.folder) for source in comparison.sources}
    lines = {line.label: line.runs for line in comparison.lines}
    joined = {label for members in lines.values() for label in members}
    groups = lines | {label: (label,) for label in records if label not in joined}
    sets = []
    for name, members in groups.items():
        known = [record for label in members if (record := records[label]) is not None]
        for entity, project in dict.fromkeys((record.entity, record.project) for record in known):
            ids = [record.id for record in known if (record.entity, record.project) == (entity, project)]
            sets.append({"name": name, "ids": ids, "project": project, "entity": entity})
    return sets


def front(comparison: Comparison) -> list[Row]:
    """Return the runs that no other beats in both cost and mean reward (the Pareto front), cheapest first."""
    known = [row for row in comparison.rows if row.kind == "run" and row.reward and comparison.x in row.costs]
    found: list[Row] = []
    for row in sorted(known, key=lambda row: (row.costs[comparison.x], -_reward(row))):
        if not found or _reward(row) > _reward(found[-1]):
            found.append(row)
    return found


def settings(sources: Sequence[Source]) -> str:
    """Return the settings that are not the same for all runs as a Markdown table: a row a setting, a column a run."""
    differ = [(key, values) for key, values in different_settings(sources) if key.split(".")[0] not in NO_SETTING]
    rows = [["setting", *(source.label for source in sources)], ["---"] * (len(sources) + 1)]
    rows += [[f"`{key}`", *values] for key, values in differ[:MOST_SETTINGS]]
    table = "\n".join(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows)
    more = len(differ) - MOST_SETTINGS
    left = f"\n\n{more} more differ: see config.yaml of the runs." if more > 0 else ""
    return table + left if differ else "All runs have the same settings."


def lines_key(label: str, figure: str) -> str:
    """Return the name under which a line's figure is logged."""
    return f"lines/{label}/{figure}"


def pictures_key(label: str) -> str:
    """Return the name under which a run's pictures are logged."""
    return f"pictures/{''.join(c if c.isalnum() or c in ' .-_=' else '-' for c in label)}"


def _figures(comparison: Comparison, with_runs: bool) -> list[dict[str, Any]]:
    """Return the table of figures, a chart a figure with a line a method, and one of the compared runs themselves."""
    panels: list[dict[str, Any]] = [{"kind": "table", "key": "figures"}]
    names = ["reward", *(f"held_out.{name}" for name in comparison.held_out)]
    if comparison.lines:
        for name in names:
            keys = [lines_key(line.label, name) for line in comparison.lines]
            panels.append({"kind": "lines", "title": name, "x": f"lines/{comparison.x}", "keys": keys})
    if with_runs:
        cost = f"cost/{comparison.x}"
        panels += [{"kind": "runs", "x": cost, "y": name.replace("held_out.", "held_out/")} for name in names]
        panels += [{"kind": "lines", "title": "steering", "x": "steering/network_calls", "keys": ["steering/reward"]}]
    return panels


def _pictures(comparison: Comparison) -> list[dict[str, Any]]:
    keys = [pictures_key(source.label) for source in comparison.sources if source.has_pictures]
    strips = [{"kind": "media", "keys": keys}] if keys else []
    return [{"kind": "table", "key": "samples"}, *strips]


def _scatter(comparison: Comparison) -> dict[str, Any]:
    title = f"reward against {COST_NAMES[comparison.x]}"
    return {"kind": "scatter", "table": "pareto", "x": comparison.x, "y": "reward", "title": title}


def _pareto_text(comparison: Comparison) -> str:
    best = ", then ".join(f"{row.label} ({_reward(row):.3g})" for row in front(comparison))
    return f"No other run gives more reward for less: {best}." if best else "No run has both a reward and this cost."


def _reward(row: Row) -> float:
    assert row.reward is not None
    return row.reward.mean


def _heading(text: str) -> dict[str, Any]:
    return {"kind": "heading", "text": text}


def _text(text: str) -> dict[str, Any]:
    return {"kind": "text", "text": text}


def _cell(value: Any) -> str:
    """Return a value as a cell of a Markdown table."""
    text = " ".join(str("" if value is None else value).split()).replace("|", "\\|")
    return text if len(text) <= 200 else f"{text[:199]}…"
