"""What a run is in W&B, kept in its folder as wandb.json: its id there, and its artifacts, a model and its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerfm.errors import RunError
from steerfm.files import read_json

RECORD = "wandb.json"
COMPARED = (
    "run.json", "config.yaml", "metrics.json", RECORD, "samples.jsonl", "samples.safetensors", "reference.safetensors",
)  # fmt: skip
PICTURES = "images/*.png"


@dataclass(frozen=True)
class Record:
    """Hold where a run is in W&B; entity and url are "" where it is offline.

    artifacts: whether the run logs any. model: what it saves, by name in its folder, such as "map", else "". inputs:
    the runs that it reads and that are in W&B too, path -> (entity, project, id).
    """

    id: str
    project: str
    entity: str = ""
    url: str = ""
    name: str = ""
    artifacts: bool = True
    model: str = ""
    inputs: dict[str, list[str]] = field(default_factory=dict)

    @property
    def path(self) -> list[str]:
        """Return entity, project and id."""
        return [self.entity, self.project, self.id]


def read_record(folder: Path) -> Record | None:
    """Return what wandb.json in a run folder says; None where there is none, or it is damaged."""
    try:
        data = read_json(folder / RECORD)
        known = {each.name for each in dataclasses.fields(Record)}
        return Record(**{key: value for key, value in data.items() if key in known})
    except (RunError, TypeError):
        return None


def origin(path: str | Path, root: str | Path) -> tuple[Path, Record] | None:
    """Return the run folder that an input of a run lies in, or is, and its record; None where it is in no W&B."""
    for start in (Path(path), Path(root) / path):
        for folder in (start, *list(start.parents)[:2]):  # runs/digits, or runs/digits/map
            if (folder / "run.json").is_file():
                found = read_record(folder)
                return None if found is None else (folder, found)
    return None


def origins(paths: Iterable[str | Path], root: str | Path) -> dict[str, tuple[Path, Record]]:
    """Return those of a run's inputs that come from runs in W&B, with these runs' folders and records."""
    found = {str(path): origin(path, root) for path in paths}
    return {path: each for path, each in found.items() if each is not None}


def model_artifact(folder: Path, record: Record) -> Any:
    """Return the model that a run saved, as a wandb.Artifact named after the run; None where it saved none.

    The same bytes are the same version in W&B, wherever the artifact is made. Nothing is copied: files are read where
    they lie when they are sent.
    """
    saved = folder / record.model
    if not (record.artifacts and record.model and saved.is_dir()):
        return None
    made = _artifact(record.name, "model", {"run": record.id, "saved_as": record.model})
    made.add_dir(str(saved.resolve()), policy="immutable", skip_cache=True)
    return made


def folder_artifact(folder: Path, record: Record) -> Any:
    """Return what `steerfm compare` reads of a run folder, as a wandb.Artifact of type "run"."""
    if not record.artifacts:
        return None
    made = _artifact(folder_name(record.id), "run", {"run": record.id, "name": record.name})
    for path in [folder / name for name in COMPARED] + sorted(folder.glob(PICTURES)):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            made.add_file(str(path.resolve()), name=name, policy="immutable", skip_cache=True)
    return made


def folder_name(identity: str) -> str:
    """Return the name of the artifact that holds the files of the run with this id in W&B."""
    return f"run-folder-{identity}"


def _artifact(name: str, kind: str, metadata: dict[str, Any]) -> Any:
    import wandb

    return wandb.Artifact("".join(c if c.isalnum() or c in "-_." else "-" for c in name), kind, metadata=metadata)
