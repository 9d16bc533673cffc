"""A comparison as a W&B run: the same table, and pictures side by side; offline unless asked otherwise."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steerfm.errors import RunError
from steerfm.files import cannot_write
from steerfm.report.compare import Comparison
from steerfm.report.pictures import chosen_pairs, read_picture, rows_by_pair
from steerfm.report.sources import Source

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
MOST_PICTURES = 108  # of one logged object, wandb 0.31
MOST_STRIP = 24  # pictures of one run's panel
DATA_VARIABLE = "WANDB_DATA_DIR"
SECONDS_TO_REACH = 20.0


def resolve_mode(mode: str | None = None) -> Mode:
    """Return `mode`, else WANDB_MODE, else "online" where WANDB_API_KEY is set and "offline" elsewhere.

    Raises RunError for an unknown mode.
    """
    chosen = mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    chosen = {"dryrun": "offline", "run": "online"}.get(chosen, chosen)  # wandb's old names, which Lightning still sets
    if chosen not in ("online", "offline", "disabled"):
        raise RunError(f"Unknown W&B mode '{chosen}': use online, offline or disabled.")
    return chosen


def log_comparison(
    comparison: Comparison, folder: str | Path, *, mode: str | None = None, project: str = "steerfm", name: str = ""
) -> Path | None:
    """Log a comparison as one W&B run kept below folder/wandb; return the run's folder, or None where disabled.

    The run holds a table "figures" (`Comparison.table`), a table "samples" (a row a prompt and seed, a picture and
    reward a run), the same pictures as a panel a run, and every figure in its summary. Nothing is ever asked:
    without credentials, or when W&B cannot be reached, the run stays offline with a warning.
    """
    chosen = resolve_mode(mode)
    if chosen == "disabled":
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(Path(folder), error) from error
    if chosen == "online":
        try:
            return _log(comparison, Path(folder), "online", project, name)
        except _unreachable() as error:
            log.warning("W&B could not be reached (%s): the comparison is kept offline.", str(error).splitlines()[0])
    kept = _log(comparison, Path(folder), "offline", project, name)
    log.info("W&B run kept offline; to send it: wandb sync %s", kept)
    return kept


def begin(folder: Path, name: str, project: str = "steerfm") -> None:
    """Begin a run in `folder` that another library's W&B callback logs to; offline without a key, or without W&B.

    That library would begin its own wherever this process first used W&B.
    """
    import wandb

    chosen = resolve_mode()
    silent = wandb.Settings(silent=True, console="off", init_timeout=SECONDS_TO_REACH)
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


def _log(comparison: Comparison, folder: Path, mode: Mode, project: str, name: str) -> Path:
    """Log to one run and finish it."""
    import wandb
    from wandb.errors import UsageError

    settings = wandb.Settings(silent=True, console="off", init_timeout=SECONDS_TO_REACH, x_disable_stats=True)
    with _files_in(folder / "wandb" / "data"):
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UsageError("no API key: set WANDB_API_KEY")
        run = wandb.init(
            project=project,
            name=name or None,
            dir=str(folder),
            mode=mode,
            job_type="compare",
            config={"x": comparison.x, "runs": [str(source.folder) for source in comparison.sources]},
            settings=settings,
            reinit="create_new",
        )
        try:
            run.log({"figures": _figures(comparison), "samples": _samples(comparison), **_strips(comparison)})
            run.summary.update(_summary(comparison))
            return Path(run.dir).parent
        finally:
            run.finish()


@contextlib.contextmanager
def _files_in(folder: Path) -> Iterator[None]:
    """Let wandb keep a table's pictures in `folder` until they are sent, and not in the home directory."""
    before = os.environ.get(DATA_VARIABLE)
    os.environ[DATA_VARIABLE] = str(folder.resolve())
    try:
        yield
    finally:
        os.environ.pop(DATA_VARIABLE)
        if before is not None:
            os.environ[DATA_VARIABLE] = before


def _figures(comparison: Comparison) -> Any:
    """Return the summary as a wandb.Table."""
    import wandb

    rows = comparison.records()
    names = list(rows[0])
    heads: list[int | str] = [*names]
    return wandb.Table(columns=heads, data=[[row[name] for name in names] for row in rows])


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
            strips[f"pictures/{''.join(c if c.isalnum() or c in ' .-_=' else '-' for c in source.label)}"] = pictures
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
