"""A comparison as a table in the terminal, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from steerfm.report.columns import Column, column_groups, columns, difference_text, differences
from steerfm.report.compare import Comparison
from steerfm.report.conclusions import meaning


class ComparisonTable:
    """Draw a comparison with rich: one table where it fits, else what came out above what it cost."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = _table(self.comparison, columns(self.comparison))
        if Measurement.get(console, options.update(width=10_000), whole).maximum <= options.max_width:
            yield whole
        else:
            for group in column_groups(self.comparison):
                yield _table(self.comparison, group, break_titles=True)
                yield Text()
        if self.comparison.pairs:
            yield Text(f"Difference to {self.comparison.pairs[0].against}, same prompts and seeds", style="bold")
            yield _differences(self.comparison)
        for said in self.comparison.conclusions:
            yield Text(f"- {said}")
        yield Text(meaning(self.comparison), style="dim")
        for label, note in self.comparison.notes:
            yield Text(f"{label}: {note}", style="dim")
        for warning in self.comparison.warnings:
            yield Text(f"warning: {warning}", style="yellow")


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print a comparison."""
    (console or Console()).print(ComparisonTable(comparison))


def markdown(comparison: Comparison) -> str:
    """Return the table, the differences to the first run, the conclusions and the warnings as Markdown."""
    shown = columns(comparison)
    text = _markdown_table(shown, [[column.text(row) for column in shown] for row in comparison.rows])
    figures, rows = differences(comparison)
    if rows:
        titles = [Column(title, "", _nothing, str) for title in _titles(figures)]
        first = Column(f"minus {comparison.pairs[0].against}", "", _nothing, str, numeric=False)
        cells = [[label, *map(difference_text, pairs)] for label, pairs in rows]
        text += "\nDifferences on the same prompts and seeds:\n\n" + _markdown_table([first, *titles], cells)
    said = "".join(f"- {_escaped(each)}\n" for each in comparison.conclusions)
    text += f"\nWhat they say:\n\n{said}\n{meaning(comparison)}\n" if said else ""
    notes = [f"- {_escaped(label)}: {_escaped(note)}\n" for label, note in comparison.notes]
    warnings = notes + [f"- Warning: {_escaped(warning)}\n" for warning in comparison.warnings]
    return text + ("\n" if warnings else "") + "".join(warnings)


def _table(comparison: Comparison, shown: Sequence[Column], break_titles: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    for column in shown:
        if column.numeric:
            table.add_column(
                textwrap.fill(column.title, 10) if break_titles else column.title, justify="right", overflow="fold"
            )
        else:
            table.add_column(column.title, overflow="fold")
    for row in comparison.rows:
        if not any(column.value(row) is not None for column in shown if column.numeric):
            continue
        table.add_row(*(Text(column.text(row)) for column in shown), style="" if row.kind == "run" else "italic")
    return table


def _differences(comparison: Comparison) -> Table:
    """Return the differences to the first run as a table."""
    figures, rows = differences(comparison)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for title in _titles(figures):
        table.add_column(title, justify="right")
    for label, pairs in rows:
        table.add_row(Text(label), *(Text(difference_text(pair)) for pair in pairs))
    return table


def _titles(figures: Sequence[str]) -> list[str]:
    return [figure.removeprefix("held_out.") for figure in figures]


def _markdown_table(shown: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a Markdown table, numbers to the right."""
    lines = [
        [_escaped(column.title) for column in shown],
        ["--:" if column.numeric else ":--" for column in shown],
        *([_escaped(cell) for cell in row] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, without HTML."""
    text = " ".join(text.split())
    for character in "\\|*_`[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _nothing(row: object) -> None:
    return None
