"""A comparison as a W&B run: the same table, pictures side by side, and a Report; offline unless asked otherwise."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from steerfm.errors import RunError, SteerfmError
from steerfm.files import read_json
from steerfm.report import published
from steerfm.report.artifacts import folder_artifact, read_record
from steerfm.report.compare import Comparison
from steerfm.report.pictures import chosen_pairs, read_picture, rows_by_pair
from steerfm.report.plan import front, lines_key, pictures_key, plan
from steerfm.report.sources import Source
from steerfm.report.wandb_run import SECONDS_TO_REACH, SECONDS_TO_SEND, WandbRun, resolve_mode, run_id

log = logging.getLogger(__name__)

MOST_PICTURES = 108  # of one logged object, wandb 0.31
MOST_STRIP = 24  # pictures of one run's panel


def log_comparison(
    comparison: Comparison,
    folder: str | Path,
    *,
    mode: str | None = None,
    project: str = "steerfm",
    name: str = "",
    title: str = "",
) -> Path | None:
    """Log a comparison as one W&B run kept below folder/wandb; return the run's folder, or None where disabled.

    The run holds a table "figures" (`Comparison.records`), "pareto" (cost and reward of the runs), "samples" (a row a
    prompt and seed, a picture and reward a run), the same pictures as a panel a run, a history of every line, and every
    figure in its summary; it uses the compared runs' artifacts where they have some. Its Report is kept as
    folder/report.json and, online, published. Nothing is ever asked: without credentials, or when W&B cannot be
    reached, the run stays offline with a warning.
    """
    chosen = resolve_mode(mode)
    if chosen == "disabled":
        return None
    folder = Path(folder)
    config = {"x": comparison.x, "runs": {source.label: source.config for source in comparison.sources}}
    given = {"project": project, "name": name or None, "job_type": "compare", "config": config, **_identity(folder)}
    with WandbRun(folder, chosen, seconds=SECONDS_TO_REACH, **given) as run:
        _log(comparison, run)
        kept, place = run.kept, {"run": run.id, "project": run.project, "entity": run.entity}
    published.keep(folder, plan(comparison, place, title or name))
    _tell(folder, run, kept)
    return kept


def _log(comparison: Comparison, run: WandbRun) -> None:
    """Log everything that is in the run: tables, pictures, lines, figures and what it was made from."""
    tables = {"figures": _table(comparison.records()), "pareto": _table(_pareto(comparison))}
    run.log({**tables, "samples": _samples(comparison), **_strips(comparison)})
    _log_lines(comparison, run)
    run.set_summary(_summary(comparison))
    _use(comparison, run)


def begin(folder: Path, name: str, project: str = "steerfm") -> None:
    """Begin a run in `folder` that another library's W&B callback logs to; offline without a key, or without W&B.

    That library would begin its own wherever this process first used W&B.
    """
    import wandb

    chosen = resolve_mode()
    silent = wandb.Settings(silent=True, console="off", init_timeout=SECONDS_TO_REACH, finish_timeout=SECONDS_TO_SEND)
    given: dict[str, Any] = {"project": project, "name": name, "dir": str(folder), "settings": silent}
    try:
        wandb.init(mode=chosen, **given)
    except _unreachable() as error:
        log.warning("W&B could not be reached (%s): the run is kept offline.", str(error).splitlines()[0])
        wandb.init(mode="offline", **given)


def _unreachable() -> tuple[type[Exception], ...]:
    """Return what wandb raises where it cannot log in or reach its server."""
    from wandb.errors import AuthenticationError, CommError, UsageError

    return (CommError, UsageError, AuthenticationError, TimeoutError)


def _identity(folder: Path) -> dict[str, Any]:
    """Return the id of a comparison that has a run folder, which it keeps when it is made again after a failure."""
    started = read_json(folder / "run.json").get("started") if (folder / "run.json").is_file() else None
    return {"id": run_id(folder, started), "resume": "allow"} if started else {}


def _tell(folder: Path, run: WandbRun, kept: Path | None) -> None:
    """Publish the Report of an online run; say where it is, or how to publish it later."""
    later = f"steerfm report publish {shlex.quote(str(folder))}"
    if run.mode != "online":
        log.info("W&B run kept offline: %s", kept)
        log.info("To send it and publish its Report: %s", later)
    elif run.warned:
        log.info("To publish the W&B Report later: %s", later)
    else:
        try:
            log.info("W&B Report: %s", published.publish(folder))
        except SteerfmError as error:
            log.warning("%s", error)


def _table(rows: list[dict[str, Any]]) -> Any:
    """Return rows of the same keys as a wandb.Table."""
    import wandb

    heads: list[int | str] = [*rows[0]]
    return wandb.Table(columns=heads, data=[list(row.values()) for row in rows])


def _pareto(comparison: Comparison) -> list[dict[str, Any]]:
    """Return cost, reward and held-out values of each run, and whether no other gives more reward for less."""
    best = [row.label for row in front(comparison)]
    figures = ["reward", *(f"held_out.{name}" for name in comparison.held_out)]
    return [
        {"label": row["label"], comparison.x: row[comparison.x]}
        | {name: row[name] for name in figures}
        | {"front": row["label"] in best}
        for row in comparison.records()
        if row["kind"] == "run"
    ]


def _log_lines(comparison: Comparison, run: WandbRun) -> None:
    """Log every line as a history of its own against cost, cheapest first, so that a chart joins its runs."""
    rows = {row["label"]: row for row in comparison.records()}
    cost = f"lines/{comparison.x}"
    if comparison.lines:
        run.define_metric("lines/*", step_metric=cost)
    figures = ["reward", *(f"held_out.{name}" for name in comparison.held_out)]
    for line in comparison.lines:
        members = [rows[label] for label in line.runs if rows[label][comparison.x] is not None]
        for row in sorted(members, key=lambda row: row[comparison.x]):
            values = {lines_key(line.label, name): row[name] for name in figures if row[name] is not None}
            run.log({cost: row[comparison.x], **values})


def _use(comparison: Comparison, run: WandbRun) -> None:
    """Name the compared runs' artifacts as what the comparison was made from."""
    for source in comparison.sources:
        record = read_record(source.folder)
        made = None if record is None else folder_artifact(source.folder, record)
        if made is not None:
            run.use_artifact(made)


def _samples(comparison: Comparison) -> Any:
    """Return a wandb.Table with a row for each prompt and seed, and each run's picture and reward in it."""
    import wandb

    sources = comparison.sources
    pairs = _pairs(comparison)[: max(1, MOST_PICTURES // len(sources))]
    columns = [_column(source, pairs) for source in sources]
    heads: list[int | str] = ["prompt", "seed"]
    heads += [head for source in sources for head in (source.label, f"{source.label}: reward")]
    data: list[Any] = [[*pair, *(cell for column in columns for cell in column[i])] for i, pair in enumerate(pairs)]
    return wandb.Table(columns=heads, data=data)


def _strips(comparison: Comparison) -> dict[str, Any]:
    """Return each run's pictures as a list of their own, which W&B shows as one panel a run."""
    pairs = _pairs(comparison)[:MOST_STRIP]
    strips = {}
    for source in comparison.sources:
        pictures = [picture for picture, _ in _column(source, pairs) if picture is not None]
        if pictures:
            strips[pictures_key(source.label)] = pictures
    return strips


def _pairs(comparison: Comparison) -> list[tuple[str, int]]:
    return [(prompt, seed) for prompt, seeds in chosen_pairs(comparison).items() for seed in seeds]


def _column(source: Source, pairs: list[tuple[str, int]]) -> list[tuple[Any, float | None]]:
    """Return a run's picture and reward for every (prompt, seed) pair, None where it has none."""
    import wandb

    places, cells = rows_by_pair(source), []
    for pair in pairs:
        index = places.get(pair)
        pixels = None if index is None else read_picture(source.samples.picture(index))
        caption = f"{source.label}, {pair[0]}, seed {pair[1]}"
        picture = None if pixels is None else wandb.Image(_readable(pixels), caption=caption)
        cells.append((picture, None if index is None else source.rows[index].get("reward")))
    return cells


def _readable(pixels: np.ndarray) -> np.ndarray:
    """Return the picture if wandb will show it; floats would come out black without a word."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise RunError(f"W&B needs uint8 pictures (H, W, 3), got {pixels.dtype} {pixels.shape}: convert with to_uint8.")
    return pixels


def _summary(comparison: Comparison) -> dict[str, Any]:
    """Return every number of every row, by run label and figure."""
    return {
        f"{row['label']}/{name}": value
        for row in comparison.records()
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
