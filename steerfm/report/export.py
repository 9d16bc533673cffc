"""Write a comparison as files for a paper: figures as PNG, PDF and SVG, tables as LaTeX and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import vl_convert

from steerfm import files
from steerfm.errors import ConfigError, nearest
from steerfm.report import charts
from steerfm.report.compare import Comparison
from steerfm.report.grid import grid
from steerfm.report.latex import tables
from steerfm.report.terminal import markdown

FORMATS = ("png", "pdf", "svg", "tex", "md")
SCALE = 3.0  # pixels of a PNG a unit of the figure
FIGURES: dict[str, Callable[[str], bytes]] = {
    "png": lambda svg: vl_convert.svg_to_png(svg, scale=SCALE),
    "pdf": vl_convert.svg_to_pdf,
    "svg": str.encode,
}


def export(
    comparison: Comparison,
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    *,
    prompts: int = 8,
    seeds: int = 8,
) -> list[Path]:
    """Write the files of these formats into a folder, over those of an earlier export, and return their paths.

    pictures.png, .pdf, .svg: a grid of the first `prompts` prompts and `seeds` seeds, where the runs have pictures.
    plots.png, .pdf, .svg: what `comparison.plot()` draws, where there is anything. Words in PDF and SVG stay text.
    quality.tex, costs.tex, differences.tex: tables for booktabs. table.md: the same as Markdown. No network is asked.
    Raises ConfigError for an unknown format and RunError where the folder cannot be written.
    """
    _check(formats, prompts, seeds)
    contents: dict[str, bytes] = {}
    wanted = [name for name in FORMATS if name in formats and name in FIGURES]
    for stem, svg in _figures(comparison, prompts, seeds) if wanted else ():
        contents |= {f"{stem}.{name}": FIGURES[name](svg) for name in wanted}
    if "tex" in formats:
        contents |= {name: text.encode() for name, text in tables(comparison).items()}
    if "md" in formats:
        contents["table.md"] = markdown(comparison).encode()
    for name, data in contents.items():
        files.write_atomic(Path(folder) / name, data, durable=False)
    return [Path(folder) / name for name in contents]


def _figures(comparison: Comparison, prompts: int, seeds: int) -> list[tuple[str, str]]:
    """Return (name, SVG) of every figure that there is something to draw for."""
    found = []
    drawn = grid(comparison, prompts, seeds)
    if drawn is not None:
        found.append(("pictures", drawn))
    if comparison.lines or charts.charts(comparison):
        found.append(("plots", vl_convert.vegalite_to_svg(charts.specification(comparison))))
    return found


def _check(formats: Sequence[str], prompts: int, seeds: int) -> None:
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(
                f"Unknown format '{name}'{nearest(name, FORMATS) or '.'} The formats are: {', '.join(FORMATS)}."
            )
    if min(prompts, seeds) < 1:
        raise ConfigError(f"A grid needs at least 1 prompt and 1 seed, got {prompts} and {seeds}.")
