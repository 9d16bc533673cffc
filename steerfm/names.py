"""Choose and check the name of a run, one for all the processes that share it."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from steerfm.errors import RunError

NAME_VARIABLE = "STEERFM_RUN"  # rank 0 chooses a run's name and hands it to the processes it starts
_RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")


def is_main_process() -> bool:
    """Say whether this is rank 0, by the variables that torchrun, SLURM and Lightning set."""
    return all(os.environ.get(key, "0") in ("", "0") for key in _RANKS)


def choose_name(recipe: str, name: str = "", root: str | Path = "runs") -> str:
    """Return the run's name: `name`, else what rank 0 chose, else recipe and SLURM job, else recipe and time.

    A requeued SLURM job of several tasks finds its run again. Raises RunError where torchrun started several
    processes and no name is given, since each would choose its own.
    """
    name = name or os.environ.get(NAME_VARIABLE, "")
    if name:
        return checked_name(name, "run name")
    stem = recipe.replace("/", "-")
    if _count("SLURM_NTASKS") > 1 and "SLURM_JOB_ID" in os.environ:
        return checked_name(f"{stem}-{os.environ['SLURM_JOB_ID']}", "run name")
    if not is_main_process() or ("TORCHELASTIC_RUN_ID" in os.environ and _count("WORLD_SIZE") > 1):
        raise RunError("Several processes need one run name between them: add name=NAME to the command.")
    stamp = f"{stem}-{datetime.now():%Y-%m-%d-%H%M%S}"
    free = (f"{stamp}-{i}" if i > 1 else stamp for i in range(1, 10_000))
    return checked_name(next(name for name in free if not (Path(root) / name).exists()), "run name")


def checked_name(name: str, what: str) -> str:
    """Return `name` if it is a relative path of plain visible parts; raise RunError otherwise."""
    parts = name.split("/")
    if any(not part or part.startswith((".", "~")) or "\\" in part or not part.isprintable() for part in parts):
        raise RunError(
            f"'{name}' is no {what}: use letters, digits and dashes, with single slashes between parts, and no '..'."
        )
    return name


def _count(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 1
