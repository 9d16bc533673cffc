"""The runs that are compared, as their folders hold them."""

from __future__ import annotations

import dataclasses
import glob
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steerfm.errors import RunError, nearest
from steerfm.files import is_number
from steerfm.records import StoredSamples
from steerfm.report.remote import PREFIX, fetched
from steerfm.runs import Run, RunInfo

FORMATS = ("PNG",)  # what runs write; others may start another program, as EPS does
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
COSTS = ("network_calls", "reward_calls", "reward_gradients", "seconds")
JOINER = "\u200d"  # of emoji
DIVERGENCE = "monitor/divergence"  # what modules/reward_fine_tuning.py logs


@dataclass(frozen=True)
class Source:
    """Hold one finished run that is compared: what it says of itself, its samples and its reference data.

    x0 (N, *dim) and reference (M, *dim) are in model space; pixels are clamped to [-1, 1], as the scored pictures
    were. Either is None where the run has none. `temperature`, `tuning_seconds` and `divergence` may come from the runs
    it reads.
    """

    label: str
    folder: Path
    info: RunInfo
    config: dict[str, Any]
    metrics: dict[str, Any]
    samples: StoredSamples
    x0: Tensor | None
    reference: Tensor | None
    temperature: float | None
    tuning_seconds: float | None
    divergence: float | None

    @property
    def note(self) -> str:
        """Return what the run says its reader must know, such as a temperature that is nominal."""
        return readable(self.info.note or str(self.metrics.get("note") or ""))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the samples' lines."""
        return self.samples.rows

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Return the (prompt, seed) pair of every sample."""
        return [(row["prompt"], row["seed"]) for row in self.rows]

    @property
    def has_pictures(self) -> bool:
        """Say whether the samples were kept as pictures (points are not)."""
        return any(self.samples.picture(i) is not None for i in range(len(self.rows)))

    def names(self, group: str) -> list[str]:
        """Return the names in a group of values ("held_out" or "parts"), in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row[group]))

    def values(self, where: str) -> np.ndarray:
        """Return a value of every sample, NaN where it has none: "reward", "held_out.NAME" or "parts.NAME"."""
        group, _, name = where.partition(".")
        found = [row.get("reward") if where == "reward" else row[group].get(name) for row in self.rows]
        return np.array([math.nan if value is None else float(value) for value in found])

    def check_where(self, where: str) -> None:
        """Raise RunError unless the samples have such a value."""
        known = ["reward", *(f"{group}.{name}" for group in ("held_out", "parts") for name in self.names(group))]
        if where not in known:
            near = nearest(where, known) or "."
            raise RunError(f"The samples of '{self.label}' have no '{where}'{near} They have: {', '.join(known)}.")


def load(path: str | Path, root: str | Path = "runs") -> Source:
    """Read a run to be compared; RunError if it is not finished, holds no samples, or is damaged."""
    run = Run.open(path, root)
    _refuse_unfinished(run)
    samples = run.read_samples()
    x0 = samples.x0
    if x0 is not None and _holds_pixels(samples, x0):
        x0 = x0.clamp(-1, 1)
    return Source(
        label=readable(run.info.label) or run.folder.name,
        folder=run.folder,
        info=run.info,
        config=run.config,
        metrics=run.read_metrics(),
        samples=samples,
        x0=x0,
        reference=run.read_reference(),
        temperature=_temperature(run, root),
        tuning_seconds=_tuning_seconds(run, root),
        divergence=_divergence(run, root),
    )


def expand(paths: Sequence[str | Path] | str | Path, root: str | Path = "runs") -> list[str]:
    """Return the runs that are meant: a run as it is; of a folder of runs (a sweep) or a pattern, every run in it.

    wandb:ENTITY/PROJECT/ID is a run in W&B, which is downloaded first. Of a folder or a pattern only runs with samples
    count; RunError where there are none. What is no folder is left for `load` to name.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        found += [name for name in _meant(str(path), Path(root)) if name not in found]
    return found


def _meant(text: str, root: Path) -> list[str]:
    """Return the runs that one entry means, by name below the root, those of a sweep in natural order."""
    if text.startswith(PREFIX):
        return [fetched(text, root)]
    places = [Path(text), root / text]
    if any((folder / "run.json").is_file() for folder in places):
        return [text]
    if any(character in text for character in "*?["):
        found = [Path(path).parent for place in places for path in glob.glob(f"{place}/run.json")]
    else:
        folder = next((folder for folder in places if folder.is_dir()), None)
        if folder is None:
            return [text]
        found = [path.parent for path in folder.glob("*/run.json")]
    inside = [path for path in dict.fromkeys(found) if (path / "samples.jsonl").is_file()]
    if not inside:
        raise RunError(
            f"No run with samples in {text} or below {root}: name runs, a folder of runs, or a pattern such as 'a-*'."
        )
    names = [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in inside]
    return sorted(names, key=_natural)


def _natural(text: str) -> list[tuple[bool, float, str]]:
    """Return a key that sorts numbers inside text by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(part[:1].isdigit(), float(part) if part[:1].isdigit() else 0.0, part) for part in parts]


def load_all(paths: Sequence[str | Path], root: str | Path = "runs") -> list[Source]:
    """Read the runs, each folder once, with labels made different where they are the same."""
    paths = expand(paths, root)
    if not paths:
        raise RunError("Nothing to compare: name at least one run, such as 'runs=[base,steered]'.")
    folders = {source.folder.resolve(): source for source in (load(path, root) for path in paths)}
    sources = list(folders.values())
    labels = [source.label for source in sources]
    named = [
        source.label if labels.count(source.label) == 1 else f"{source.label} ({place(source.folder, root)})"
        for source in sources
    ]
    return [dataclasses.replace(source, label=_numbered(named, i)) for i, source in enumerate(sources)]


def _numbered(labels: Sequence[str], i: int) -> str:
    """Return the i-th label, with a number where others have it too."""
    if labels.count(labels[i]) == 1:
        return labels[i]
    number = labels[: i + 1].count(labels[i])
    while f"{labels[i]} {number}" in labels:
        number += len(labels)
    return f"{labels[i]} {number}"


def place(folder: Path, root: str | Path) -> str:
    """Return a run's folder as a name below the root, where it lies there."""
    inside = folder.resolve().is_relative_to(Path(root).resolve())
    return folder.resolve().relative_to(Path(root).resolve()).as_posix() if inside else str(folder)


def readable(text: str) -> str:
    """Return text without characters that steer a terminal or turn the direction of what follows; emoji stay whole."""
    return "".join(c if c.isprintable() or c == JOINER else " " for c in text)


def _refuse_unfinished(run: Run) -> None:
    if run.info.status == "finished":
        return
    if run.in_use_by:
        raise RunError(f"The run '{run.info.name}' is still running ({run.in_use_by}): wait for it, or leave it out.")
    state = f"failed ({run.info.error.rstrip('.')})" if run.info.status == "failed" else "was stopped before its end"
    raise RunError(f"The run '{run.info.name}' {state}: run its command again, which resumes it, or leave it out.")


def _holds_pixels(samples: StoredSamples, x0: Tensor) -> bool:
    """Say whether x0 is the picture itself, of the same height and width, and not a latent."""
    picture = next((path for i in range(len(samples)) if (path := samples.picture(i)) is not None), None)
    if picture is None or x0.ndim != 4 or x0.shape[1] not in (1, 3):
        return False
    try:
        with Image.open(picture, formats=FORMATS) as image:
            return image.size == (x0.shape[3], x0.shape[2])
    except UNREADABLE:
        return False


def _chain(run: Run, root: str | Path, depth: int = 8) -> list[Run]:
    """Return the run and the runs it was made from that are still there, nearest first."""
    found = [run]
    for path in run.info.inputs if depth else ():
        try:
            found += _chain(Run.open(path, root), root, depth - 1)
        except RunError:
            continue  # an input may be a map or a file, or may have been deleted since
    return found


def _temperature(run: Run, root: str | Path) -> float | None:
    """Return the temperature that the run, or else a run it was made from, says it used.

    A method that names its temperature settles it, also where that is null (an argmax takes none).
    """
    for candidate in _chain(run, root):
        metrics, config = candidate.read_metrics(), candidate.config
        method = config.get("method")
        if "temperature" not in metrics and isinstance(method, dict) and "temperature" in method:
            return _find_number(method, "temperature")
        for place in (metrics, config):
            found = _find_number(place, "temperature")
            if found is not None:
                return found
    return None


def _tuning_seconds(run: Run, root: str | Path) -> float | None:
    """Return how long the fine-tuning behind the run took altogether, or None if there was none."""
    tuning = {c.folder.resolve(): c.info.seconds for c in _chain(run, root) if c.info.command == "finetune"}
    return sum(tuning.values()) if tuning else None


def _divergence(run: Run, root: str | Path) -> float | None:
    """Return the divergence from the base that the fine-tuning behind the run measured last, or None."""
    for candidate in _chain(run, root):
        if candidate.info.command == "finetune":
            return _find_number(candidate.read_metrics(), DIVERGENCE)
    return None


def _find_number(config: Any, key: str) -> float | None:
    """Return the number under `key` that stands highest in nested dictionaries, or None."""
    level = [config]
    while level:
        for place in level:
            value = place.get(key) if isinstance(place, dict) else None
            if is_number(value):
                return float(value)
        level = [item for place in level if isinstance(place, dict) for item in place.values()]
    return None


def same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    """Say whether two sets of reference data are one."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
