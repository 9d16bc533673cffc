"""A comparison made before, read again from the runs that it compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steerfm.errors import RunError
from steerfm.report.compare import Comparison, compare
from steerfm.runs import Run, input_fingerprint


def reopen(run: Run) -> Comparison:
    """Return the comparison that a run of `steerfm compare` (or `write_comparison`) kept, with what is there now.

    Raises RunError for a run that is no finished comparison, and where a compared run is gone.
    """
    if run.info.command != "compare" or run.info.status != "finished":
        what = "unfinished" if run.info.command == "compare" else f"of 'steerfm {run.info.command}'"
        raise RunError(
            f"The run {run.folder} is {what}, and a finished comparison is needed: steerfm compare 'runs=[...]'."
        )
    config = run.config
    return compare(
        [_found(run, str(name)) for name in config.get("runs") or ()],
        subsets=config.get("subsets") or (),
        x=str(config.get("x") or "network_calls"),
        root=_root(run),
        lines=_lines(config.get("lines")),
    )


def changed(run: Run) -> list[str]:
    """Return the runs that are not what they were when the comparison was made."""
    return [path for path, before in run.info.inputs.items() if _now(path, run) not in (before, None)]


def _now(path: str, run: Run) -> str | None:
    """Return the present fingerprint of something that the comparison read, or None where it has moved."""
    try:
        return input_fingerprint(_found(run, path), _root(run))
    except RunError:
        return None


def _root(run: Run) -> Path:
    """Return the folder that the run's name starts from."""
    return run.folder.resolve().parents[len(Path(run.info.name).parts) - 1]


def _found(run: Run, name: str) -> str | Path:
    """Return a compared run's folder: beside the comparison, where it was read, or as it was named; else the name."""
    return next((folder for folder in _places(run, name) if (folder / "run.json").is_file()), name)


def _places(run: Run, name: str) -> Iterator[Path]:
    yield _root(run) / name
    yield from (
        Path(path) for path in run.info.inputs if Path(path).parts[-len(Path(name).parts) :] == Path(name).parts
    )
    yield Path(str(run.config.get("folder") or "runs"), name)


def _lines(kept: Any) -> dict[str, Mapping[str, Any]]:
    """Return the lines as `compare` takes them, from a recipe's nested names or from the list of `write_comparison`."""
    if isinstance(kept, Mapping):
        return dict(kept)
    found: dict[str, dict[str, Any]] = {}
    for line in kept or ():
        found.setdefault(line["group"], {})[line["label"]] = line["runs"]
    return dict(found)
