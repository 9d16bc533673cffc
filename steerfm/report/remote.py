"""Runs that are in W&B, as folders here: `wandb:ENTITY/PROJECT/ID` is downloaded once and compared like any other."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from steerfm.errors import RunError
from steerfm.files import cannot_write, read_json, write_atomic
from steerfm.names import checked_name
from steerfm.report.artifacts import COMPARED, folder_name, read_record
from steerfm.report.wandb_run import bounded, first_line, has_key

log = logging.getLogger(__name__)

PREFIX = "wandb:"
MOST_FILES = 100_000
MOST_BYTES = 16 * 2**30
MOST_PARENTS = 8  # from a run to what it was made from, to what that was made from, ...
SECONDS_TO_ASK = 60.0
SECONDS_TO_DOWNLOAD = 3600.0
_PICTURE = re.compile(r"images/[0-9]{1,9}\.png")


def fetched(address: str, root: str | Path = "runs") -> str:
    """Return the name below `root` of the run that wandb:ENTITY/PROJECT/ID names, downloaded there if it is not yet.

    It lies in wandb/ENTITY/PROJECT/ID, and beside it what is known of the runs that it was made from. Only files that
    a run folder has are taken, JSON, YAML, PNG and safetensors, each below that folder. Raises RunError, in one
    sentence, for an address of another form, without a key, and where W&B has no such run or cannot be reached.
    """
    parts = address.removeprefix(PREFIX).split("/")
    if not address.startswith(PREFIX) or len(parts) != 3:
        raise RunError(f"'{address}' is no run in W&B: write wandb:ENTITY/PROJECT/ID, as in the run's address there.")
    return _fetched(parts, Path(root), MOST_PARENTS)


def _fetched(parts: list[str], root: Path, parents: int) -> str:
    name = checked_name("/".join(["wandb", *parts]), "run in W&B")
    folder = root / name
    if not (folder / "run.json").is_file():
        staging = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            _download(parts, staging)
            _point_at_parents(staging, root, parents)
            staging.rename(folder)
        except OSError as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        log.info("Downloaded %s%s to %s", PREFIX, "/".join(parts), folder)
    return name


def _download(parts: list[str], folder: Path) -> None:
    """Write the checked files of a run's artifact to a folder."""
    import wandb

    if not has_key():
        raise RunError("W&B needs a key to read a run there: set WANDB_API_KEY.")
    entity, project, identity = parts
    folder.mkdir(parents=True)
    place = f"{entity}/{project}/{folder_name(identity)}:latest"
    try:
        artifact = bounded(SECONDS_TO_ASK, lambda: wandb.Api().artifact(place, type="run"))
        _check(bounded(SECONDS_TO_ASK, lambda: artifact.manifest.entries))
        bounded(SECONDS_TO_DOWNLOAD, artifact.download, root=str(folder), skip_cache=True)
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"The run {PREFIX}{'/'.join(parts)} could not be read from W&B ({first_line(error)}): see that it was made "
            "with logger=wandb and logger.artifacts=true and has been sent, and that the key may read it."
        ) from error
    if not (folder / "run.json").is_file():
        raise RunError(f"What W&B holds of {PREFIX}{'/'.join(parts)} is no run folder: it has no run.json.")


def _check(entries: dict[str, Any]) -> None:
    """Raise RunError unless every file has the name of one of a run folder's, lies in W&B itself, and all are bounded.

    A reference could name any file or address; wandb would fetch it.
    """
    for name, entry in entries.items():
        if not (name in COMPARED or _PICTURE.fullmatch(name)):
            raise RunError(f"The run's files in W&B hold '{name}', which no run folder has: it was not downloaded.")
        if entry.ref is not None and not str(entry.ref).startswith("wandb-artifact://"):
            raise RunError(f"'{name}' of the run's files in W&B is a reference to elsewhere: it was not downloaded.")
    size = sum(int(entry.size or 0) for entry in entries.values())
    if len(entries) > MOST_FILES or size > MOST_BYTES:
        raise RunError(
            f"The run's files in W&B are {len(entries):,} and {size / 2**30:.1f} GiB, more than {MOST_FILES:,} or "
            f"{MOST_BYTES / 2**30:.0f} GiB: copy the run folder itself."
        )


def _point_at_parents(folder: Path, root: Path, parents: int) -> None:
    """Let run.json name the runs that this one was made from where they lie here; those that cannot be had stay out."""
    record, info = read_record(folder), read_json(folder / "run.json")
    inputs = info.get("inputs")
    if record is None or not isinstance(inputs, dict) or parents == 0:
        return
    for path, parts in record.inputs.items():
        if path in inputs and isinstance(parts, list) and len(parts) == 3 and all(isinstance(p, str) for p in parts):
            try:
                here = _fetched([parts[0] or record.entity, *parts[1:]], root, parents - 1)
            except RunError as error:
                log.info("%s", error)
                continue
            inputs[here] = inputs.pop(path)
    write_atomic(folder / "run.json", (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())
