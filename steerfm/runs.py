"""The run folder: what every command writes and `steerfm compare` reads, and nothing else.

    runs/NAME/  config.yaml   run.json   metrics.json   checkpoints/   map/
                samples.jsonl   samples.safetensors   images/   reference.safetensors

Every file is written whole or not at all. A finished run is never overwritten; an unfinished one of the same
name and the same fingerprint (config and inputs) is resumed. One process holds a folder at a time; the other
processes of a distributed run only look on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

import safetensors
import safetensors.torch
import yaml
from torch import Tensor

from steerfm import files, provenance, records
from steerfm.errors import RunError, SteerfmError, nearest
from steerfm.names import NAME_VARIABLE, checked_name, choose_name, is_main_process
from steerfm.types import Samples

log = logging.getLogger(__name__)

__all__ = [
    "Run",
    "RunInfo",
    "choose_name",
    "find_run",
    "input_fingerprint",
    "is_main_process",
    "run_fingerprint",
    "set_aside",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # of a model on the hub, org/name
ATTACH_SECONDS = 60.0


@dataclass(frozen=True)
class RunInfo:
    """Hold what run.json says; times are UTC in ISO 8601, `seconds` sums over resumptions."""

    name: str
    command: str
    recipe: str
    label: str
    status: Literal["running", "finished", "failed"]
    fingerprint: str
    started: str
    finished: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    error: str = ""
    note: str = ""


@dataclass
class Run:
    """Read or write one run folder; made by `Run.start` (to write) or `Run.open` (to read).

    As a context manager it finishes when the block ends and fails, with the error's sentence kept, when it raises.
    """

    folder: Path
    info: RunInfo
    resumed: bool = False
    writes: bool = False  # false for a run that is only read, and in the other processes of a distributed run
    clock: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls,
        name: str,
        *,
        command: str,
        config: Mapping[str, Any],
        recipe: str,
        label: str = "",
        inputs: Sequence[str | Path] = (),
        root: str | Path = "runs",
    ) -> Run:
        """Create the run folder root/name, or resume it if it is unfinished and was made from the same config.

        `inputs` are the runs, files or folders that it reads. Raises RunError if the run is finished, was begun
        with another config, is in use by another process, or cannot be written.
        """
        folder = _folder(root, name)
        wanted = RunInfo(
            name=name,
            command=command,
            recipe=recipe,
            label=label or name,
            status="running",
            fingerprint=run_fingerprint(config, inputs, root),
            started=_now(),
            versions=provenance.versions(),
            git=provenance.git_state(),
            inputs={str(path): input_fingerprint(path, root) for path in inputs},
        )
        if not is_main_process():
            return _attach(cls, folder, wanted)
        _refuse_nesting(Path(root), name)
        _refuse_foreign(folder)
        files.lock_folder(folder)
        try:
            run = _begin(cls, folder, wanted, provenance.plain(config))
        except BaseException:
            files.unlock_folder(folder)
            raise
        os.environ[NAME_VARIABLE] = name
        return run

    @classmethod
    def open(cls, path: str | Path, root: str | Path = "runs") -> Run:
        """Open a run for reading, by its folder or by its name below `root`; RunError if there is none."""
        folder = find_run(path, root)
        return cls(folder, _read_info(folder))

    @staticmethod
    def is_done(root: str | Path, name: str, fingerprint: str) -> bool:
        """Say whether root/name is finished and was made from exactly what `fingerprint` stands for."""
        folder = _folder(root, name)
        if not (folder / "run.json").exists():
            return False
        info = _read_info(folder)
        return info.status == "finished" and info.fingerprint == fingerprint

    @property
    def config(self) -> dict[str, Any]:
        """Return the composed config."""
        return files.read_yaml(self.folder / "config.yaml")

    @property
    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint to resume from, or None."""
        path = self.folder / "checkpoints" / "last.ckpt"
        return path if path.exists() else None

    @property
    def in_use_by(self) -> str:
        """Return who is writing the run now, or ""."""
        return files.holder(self.folder)

    def finish(self, metrics: Mapping[str, float] | None = None, note: str = "") -> None:
        """Mark the run finished, keep its metrics, and let go of the folder."""
        if metrics is not None:
            self.write_json("metrics.json", records.finite(dict(metrics)))
        self._end(status="finished", note=note or self.info.note, error="")

    def fail(self, error: BaseException | str) -> None:
        """Mark the run failed with a sentence that says why, and let go of the folder; it can be resumed."""
        if isinstance(error, KeyboardInterrupt):
            error = "interrupted"
        elif isinstance(error, BaseException) and not isinstance(error, SteerfmError):
            error = f"{type(error).__name__}: {error}"
        try:
            self._end(status="failed", error=str(error))
        except RunError as failure:  # a full disk must not hide what went wrong first
            log.warning("%s", failure)

    def write_json(self, name: str, data: Any) -> None:
        """Write data as JSON to `name` inside the folder, atomically; NaN and infinity are refused."""
        self.write_text(name, json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write text to `name` inside the folder, atomically."""
        self.write_bytes(name, text.encode())

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors to `name` inside the folder, atomically."""
        self.write_bytes(name, safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}))

    def write_bytes(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write bytes to `name` inside the folder, atomically; nothing happens outside the main process."""
        path = self.folder / checked_name(name, "file name")
        if not is_main_process():
            return
        if not self.writes:
            raise RunError(f"The run {self.folder} is open for reading only, so {name} was not written to it.")
        files.write_atomic(path, data, durable=durable)

    def write_samples(
        self,
        samples: Samples | Sequence[Samples],
        *,
        held_out: Mapping[str, Tensor] | None = None,
        reward_unclamped: Tensor | None = None,
    ) -> None:
        """Write samples (one batch or several) to samples.jsonl, samples.safetensors and images/.

        held_out: values (N,) by name, for all batches together, of rewards that were never optimised.
        reward_unclamped: rewards (N,) of the pictures before clamping. samples.jsonl comes last, so that it
        never names a picture that is not there. Points (B, d) have no pictures.
        """
        batches = [samples] if isinstance(samples, Samples) else list(samples)
        for name, png in records.pictures(batches):
            self.write_bytes(name, png, durable=False)  # can be drawn again from x0
        self.write_tensors("samples.safetensors", {"x0": records.stack([batch.x0 for batch in batches])})
        self.write_text("samples.jsonl", records.lines(batches, held_out or {}, reward_unclamped))
        notes = {batch.note for batch in batches if batch.note} - {self.info.note}
        if notes and self.writes:
            self._keep(note=" ".join(filter(None, [self.info.note, *sorted(notes)])))

    def write_reference(self, x0: Tensor) -> None:
        """Write the real data (M, *dim), in model space, that this run's samples are to be compared with."""
        self.write_tensors("reference.safetensors", {"x0": x0})

    def read_samples(self) -> records.StoredSamples:
        """Return the samples; RunError if there are none or a file is damaged (a cut-off last line is left out)."""
        return records.read(self.folder, hint=f"the run '{self.info.name}' ({self.info.command})")

    def read_reference(self) -> Tensor | None:
        """Return the reference data (M, *dim) in model space, or None."""
        path = self.folder / "reference.safetensors"
        return records.read_tensor(path) if path.exists() else None

    def read_metrics(self) -> dict[str, Any]:
        """Return metrics.json, or {} where there is none."""
        path = self.folder / "metrics.json"
        return files.read_json(path) if path.exists() else {}

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.info.status != "running":
            return
        if error is None:
            self.finish()
        else:
            self.fail(error)

    def _keep(self, **changes: Any) -> None:
        """Change what run.json says."""
        info = dataclasses.replace(self.info, **changes)
        self.write_json("run.json", dataclasses.asdict(info))
        self.info = info

    def _end(self, **changes: Any) -> None:
        seconds = self.info.seconds + time.monotonic() - self.clock
        try:
            self._keep(finished=_now(), seconds=round(seconds, 3), **changes)
        finally:
            if self.writes:
                files.unlock_folder(self.folder)
                os.environ.pop(NAME_VARIABLE, None)
            self.writes = False


def run_fingerprint(config: Mapping[str, Any], inputs: Iterable[str | Path] = (), root: str | Path = "runs") -> str:
    """Return the fingerprint of a config and of the present state of the runs, files or folders it reads."""
    return provenance.fingerprint(config, [input_fingerprint(path, root) for path in inputs])


def input_fingerprint(path: str | Path, root: str | Path = "runs") -> str:
    """Return a finished run's own fingerprint, another for the same run unfinished, else that of the bytes.

    A hub id, org/name, stands for itself. Raises RunError if there is nothing at `path`.
    """
    if not (Path(path) / "run.json").exists() and not (Path(root) / path / "run.json").exists():
        if not Path(path).exists():
            if HUB_ID.fullmatch(str(path)) and not Path(path).parent.exists():
                return provenance.fingerprint({"hub": str(path)})
            raise RunError(f"Nothing found at {path}: make it first, or correct the path.")
        return files.file_fingerprint(Path(path))
    info = Run.open(path, root).info
    return (
        info.fingerprint if info.status == "finished" else provenance.fingerprint({}, [info.fingerprint, "unfinished"])
    )


def find_run(path: str | Path, root: str | Path = "runs") -> Path:
    """Return the folder of a run given by its folder or by its name below `root`; RunError if there is none."""
    for folder in (Path(path), Path(root) / path):
        if (folder / "run.json").is_file():
            return folder
    known = [p.parent.relative_to(root).as_posix() for p in Path(root).rglob("run.json")] if Path(root).is_dir() else []
    raise RunError(f"No run at {path} or {Path(root) / path}{nearest(str(path), known) or '.'}")


def set_aside(root: str | Path, name: str) -> Path:
    """Rename a run's folder to NAME.old-1 (or -2, ...) and return where it is now, so that NAME is free again.

    Raises RunError while another process is writing the run.
    """
    folder = _folder(root, name)
    taken_by = files.holder(folder)
    if taken_by:
        raise RunError(f"The run folder {folder} is in use by {taken_by}: wait until that ends.")
    new = next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
    try:
        return folder.rename(new)
    except OSError as error:
        raise files.cannot_write(new, error) from error


def _begin(cls: type[Run], folder: Path, wanted: RunInfo, config: dict[str, Any]) -> Run:
    """Create or resume the run in a folder that this process holds."""
    if not (folder / "run.json").exists():
        run = cls(folder, wanted, writes=True)
        run.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        run._keep()
        return run
    before = _read_info(folder)
    _refuse_other(folder, before, wanted)
    files.remove_leftovers(folder)
    run = cls(folder, before, resumed=True, writes=True)
    run._keep(status="running", finished="", error="", versions=wanted.versions, git=wanted.git, label=wanted.label)
    return run


def _attach(cls: type[Run], folder: Path, wanted: RunInfo) -> Run:
    """Return the run that rank 0 starts, for reading, in another process of the same job."""
    deadline = time.monotonic() + ATTACH_SECONDS
    while not (folder / "run.json").exists():
        if time.monotonic() > deadline:
            raise RunError(f"Rank 0 did not create {folder} within {ATTACH_SECONDS:.0f} s: see what it printed.")
        time.sleep(0.1)
    info = _read_info(folder)
    _refuse_other(folder, info, wanted)
    return cls(folder, info, resumed=info.started < wanted.started)


def _refuse_other(folder: Path, before: RunInfo, wanted: RunInfo) -> None:
    """Raise RunError if the folder's run is finished, or was begun with another config or other inputs."""
    fix = f"choose another name (name=...), or delete the folder {folder}"
    if before.status == "finished":
        raise RunError(f"The run '{before.name}' is finished, and a finished run is never overwritten: {fix}.")
    if before.fingerprint != wanted.fingerprint:
        changed = "other inputs" if before.inputs != wanted.inputs else "another recipe"
        raise RunError(f"The unfinished run '{before.name}' was begun with {changed}: {fix}, or restore what changed.")


def _refuse_nesting(root: Path, name: str) -> None:
    """Raise RunError if a folder above the new run is a run itself, whose deletion would take this one along."""
    for parent in list(PurePosixPath(name).parents)[:-1]:
        if (root / parent / "run.json").exists():
            raise RunError(f"'{name}' would lie inside the run '{parent}': choose a name outside it.")


def _refuse_foreign(folder: Path) -> None:
    """Raise RunError if the folder holds files that no run wrote, or a run would be put over other runs."""
    try:
        foreign = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != "config.yaml"]
    except FileNotFoundError:
        return
    except OSError as error:
        raise files.cannot_write(folder, error) from error
    if foreign and not (folder / "run.json").exists():
        raise RunError(f"{folder} is no run folder and holds '{sorted(foreign)[0]}': choose another name.")


def _folder(root: str | Path, name: str) -> Path:
    return Path(root) / checked_name(name, "run name")


def _read_info(folder: Path) -> RunInfo:
    """Return what run.json says; unknown keys, written by a newer steerfm, are left out."""
    path = folder / "run.json"
    data = files.read_json(path)
    known = {f.name for f in dataclasses.fields(RunInfo)}
    try:
        info = RunInfo(**{key: value for key, value in data.items() if key in known})
    except TypeError as error:
        raise files.damaged(path, error) from error
    for each in dataclasses.fields(RunInfo):
        value, plain = getattr(info, each.name), dict if str(each.type).startswith("dict") else str
        if not (files.is_number(value) if each.name == "seconds" else isinstance(value, plain)):
            raise files.damaged(path, f"its {each.name} is {value!r}"[:200])
    return info


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
