"""`steerfm compare`: finished runs side by side, in the terminal, as a page, and in W&B."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from steerfm import report
from steerfm.commands import common
from steerfm.config import Composed
from steerfm.errors import ConfigError, nearest
from steerfm.runs import Run

REPORTS = ("html", "wandb", "none")


def run(arguments: argparse.Namespace) -> int:
    """Compare runs (at each point of a sweep, in turn)."""
    for recipe in common.each(arguments, "compare"):
        if recipe.values["report"] == "none":
            _print(_comparison(recipe.values))
        else:
            compare(recipe)
    return 0


def compare(recipe: Composed) -> Path:
    """Compare the runs that a composed recipe names; print the table, write the page, return the run folder."""
    runs = report.expand(recipe.values["runs"], recipe.values["folder"])
    recipe = recipe.changed(runs=runs, inputs=runs)
    values = recipe.values
    _check_report(values["report"])
    mode = (None if values["mode"] == "auto" else values["mode"]) if values["report"] == "wandb" else "disabled"
    comparison = _comparison(values)
    with common.start(recipe) as run:
        page = report.write_comparison(comparison, run, title=values["title"] or "", wandb_mode=mode)
        run.finish()
    _print(comparison, page)
    return run.folder


def show(folder: Path) -> None:
    """Print a comparison made before, and where its page is."""
    _print(_comparison(Run.open(folder).config), folder / "page.html")


def _comparison(values: dict[str, Any]) -> report.Comparison:
    with common.console.status("Comparing"):
        return report.compare(
            values["runs"], subsets=values["subsets"], x=values["x"], root=values["folder"], lines=values["lines"]
        )


def _check_report(asked: str) -> None:
    if asked not in REPORTS:
        raise ConfigError(f"report is one of {', '.join(REPORTS)}, got '{asked}'{nearest(str(asked), REPORTS)}")


def _print(comparison: report.Comparison, page: Path | None = None) -> None:
    report.show(comparison, common.console)
    if page is not None:
        common.console.print(f"Page: {page.resolve()}", soft_wrap=True)
