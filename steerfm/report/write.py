"""Keep a comparison in a run folder of its own: page.html, pictures.png, curves.png, table.json, table.md, wandb/."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from steerfm.provenance import plain
from steerfm.report.compare import Comparison, Pair
from steerfm.report.encodings import png
from steerfm.report.lines import lines
from steerfm.report.page import page
from steerfm.report.sheet import sheet
from steerfm.report.sources import place
from steerfm.report.terminal import markdown
from steerfm.report.wandb import log_comparison, resolve_mode
from steerfm.runs import Run, run_fingerprint


def write_comparison(
    comparison: Comparison, folder: str | Path | Run, *, title: str = "", wandb_mode: str | None = "disabled"
) -> Path:
    """Write a comparison and return the path of its page.

    folder: where the run folder is to be; or a started Run, which stays open for its owner to finish. The same
    comparison of unchanged runs is not written twice. wandb_mode: "disabled", "offline", "online", or None for
    what the environment says (`resolve_mode`). Raises RunError if another finished run is there.
    """
    mode = resolve_mode(wandb_mode)
    if isinstance(folder, Run):
        _write(comparison, folder, title, mode)
        return folder.folder / "page.html"
    root, name = Path(folder).parent, Path(folder).name
    config = describe(comparison, title, mode)
    inputs = comparison.inputs
    if not Run.is_done(root, name, run_fingerprint(config, inputs, comparison.root)):
        options: dict[str, Any] = {"label": title, "inputs": [path.resolve() for path in inputs], "root": root}
        with Run.start(name, command="compare", config=config, recipe="compare", **options) as run:
            _write(comparison, run, title, mode)
    return Path(folder) / "page.html"


def describe(comparison: Comparison, title: str = "", wandb_mode: str = "disabled") -> dict[str, Any]:
    """Return the config that a comparison is made from."""
    return {
        "runs": [place(source.folder, comparison.root) for source in comparison.sources],
        "subsets": plain(list(comparison.subsets)),
        "x": comparison.x,
        "lines": [dataclasses.asdict(line) for line in comparison.lines],
        "title": title,
        "wandb_mode": wandb_mode,
    }


def _write(comparison: Comparison, run: Run, title: str, mode: str) -> None:
    """Write the files of a comparison; the page comes last, since its presence says that all is there."""
    table = {
        "rows": comparison.records(),
        "differences": [_difference(pair) for pair in comparison.pairs],
        "equal_cost": [dataclasses.asdict(found) for found in comparison.equal_cost],
        "conclusions": comparison.conclusions,
        "warnings": list(comparison.warnings),
        "prompts": list(comparison.prompts),
        "equal_samples": comparison.equal_samples,
    }
    run.write_json("table.json", table)
    run.write_text("table.md", markdown(comparison))
    if all(source.has_pictures for source in comparison.sources):
        run.write_bytes("pictures.png", sheet(comparison))
    if comparison.lines:
        run.write_bytes("curves.png", png(lines(comparison)))
    log_comparison(comparison, run.folder, mode=mode, name=run.info.name, title=title)
    run.write_text("page.html", page(comparison, title))


def _difference(pair: Pair) -> dict[str, Any]:
    """Return a paired difference as plain values."""
    return {**dataclasses.asdict(pair), "within_noise": pair.within_noise}
