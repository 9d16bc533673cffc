"""What a run folder says of its samples: one JSON line each, their tensors, and their pictures."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from steerfm import files, images
from steerfm.errors import RunError
from steerfm.types import Samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSamples:
    """Hold the samples read from a run folder: one row each (see `lines`), their x0 (N, *dim) or None, and warnings."""

    folder: Path
    rows: list[dict[str, Any]]
    x0: Tensor | None
    warnings: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, index: int) -> Path | None:
        """Return the path of row `index`'s picture, or None where it has none; it never leads out of the folder."""
        name = self.rows[index].get("image")
        if not isinstance(name, str):
            return None
        path = self.folder / name
        inside = path.resolve().is_relative_to(self.folder.resolve())
        return path if inside and path.is_file() else None


def lines(batches: Sequence[Samples], held_out: Mapping[str, Tensor], reward_unclamped: Tensor | None) -> str:
    """Return samples.jsonl: a line a sample with its prompt, seed, rewards, weight, cost and picture.

    Numbers that are not finite become null. `reward_unclamped` is kept where it differs from the reward.
    """
    rows: list[dict[str, Any]] = []
    for batch in batches:
        rows += [_row(batch, i, len(rows) + i) for i in range(len(batch))]
    for name, values in held_out.items():
        _check_length(name, values, len(rows))
    for i, row in enumerate(rows):
        row["held_out"] = {name: values[i].item() for name, values in held_out.items()}
        if reward_unclamped is not None and reward_unclamped[i].item() != row["reward"]:
            row["reward_unclamped"] = reward_unclamped[i].item()
    return "".join(json.dumps(finite(row), allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


def _row(batch: Samples, i: int, index: int) -> dict[str, Any]:
    """Return one sample's line as a dictionary."""
    return {
        "index": index,
        "prompt": batch.prompts[i] if batch.prompts else "",
        "seed": int(batch.seeds[i]),
        "reward": None if batch.rewards is None else batch.rewards[i].item(),
        "parts": {name: values[i].item() for name, values in batch.parts.items()},
        "held_out": {},
        "log_weight": _log_weight(batch, i),
        "effective_sample_size": (
            None if batch.effective_sample_size is None else batch.effective_sample_size[i].item()
        ),
        "cost": asdict(batch.cost),
        "image": _image_name(index) if has_pictures(batch) else None,
    }


def _log_weight(batch: Samples, i: int) -> float | None:
    """Return the normalised log-weight of the particle that was drawn as sample i, or None without weights."""
    if batch.log_weights is None:
        return None
    if batch.particles is None:
        return batch.log_weights[i, 0].item() if batch.log_weights.shape[1] == 1 else None
    apart = (batch.particles[i] - batch.x0[i]).flatten(1).abs().amax(1)
    return batch.log_weights[i, int(apart.argmin())].item()


def log_weights(batch: Samples) -> Tensor | None:
    """Return the log-weight of every sample's particle, (B, 1), or None where one of them is not known."""
    values = [_log_weight(batch, i) for i in range(len(batch))]
    if any(value is None for value in values):
        return None
    return torch.tensor(values, dtype=torch.float64)[:, None]


def pictures(batches: Sequence[Samples]) -> Iterator[tuple[str, bytes]]:
    """Yield the file name and PNG of every sample that has a picture."""
    index = 0
    for batch in batches:
        for i in range(len(batch)):
            if has_pictures(batch):
                yield _image_name(index), images.encode_png(batch.images[i].detach().float().cpu())
            index += 1


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return the batches as one float32 tensor (N, *dim) on the CPU; RunError if there is none."""
    if not tensors:
        raise RunError("A run of no samples cannot be written: sample at least one.")
    return torch.cat([tensor.detach().float().cpu() for tensor in tensors])


def finite(value: Any) -> Any:
    """Return plain data with None in place of every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(folder: Path, hint: str) -> StoredSamples:
    """Return the samples in a run folder.

    A last line that is cut off is left out with a warning; any other damage raises RunError, and so does a
    folder without samples.jsonl.
    """
    path = folder / "samples.jsonl"
    if not path.exists():
        raise RunError(f"No samples in {folder}: {hint} wrote none; run `steerfm sample` or `steerfm steer` on it.")
    rows, warnings = _read_lines(path)
    tensors = folder / "samples.safetensors"
    if not tensors.exists():
        return StoredSamples(folder, rows, None, [*warnings, f"{tensors} is missing: no diversity, no distances."])
    x0 = read_tensor(tensors)
    places = [int(row["index"]) for row in rows]
    if places and max(places) >= len(x0):
        raise files.damaged(tensors, f"{path.name} lists {max(places) + 1} samples, it holds {len(x0)}")
    return StoredSamples(folder, rows, x0[places], warnings)


def read_tensor(path: Path) -> Tensor:
    """Return the tensor "x0" of a safetensors file as float32; RunError if it is damaged."""
    try:
        return safetensors.torch.load_file(path)["x0"].float()
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise files.damaged(path, error) from error


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of samples.jsonl, and a warning if the last line was cut off."""
    try:
        texts = files.read_text(path, errors="replace").removesuffix("\n").split("\n")
    except OSError as error:
        raise files.damaged(path, error) from error
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            rows.append(_checked_row(json.loads(text), len(rows)))
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(texts) and rows:
                return rows, [f"The last line of {path} is cut off: one sample is left out."]
            raise files.damaged(path, f"line {number}: {error}") from error
    if not rows:
        raise files.damaged(path, "it is empty")
    return rows, []


def _checked_row(row: Any, place: int) -> dict[str, Any]:
    """Return a row with every key that readers count on; TypeError if it is none."""
    if not isinstance(row, dict) or "prompt" not in row or "seed" not in row:
        raise TypeError("not a sample with a prompt and a seed")
    defaults = {"index": place, "reward": None, "parts": {}, "held_out": {}, "cost": {}, "image": None}
    whole = {**defaults, **{key: value for key, value in row.items() if value is not None}}
    numbers = [whole["reward"]]
    for group in ("parts", "held_out", "cost"):
        numbers += list(whole[group].values()) if isinstance(whole[group], dict) else [group]
    if not isinstance(whole.get("prompt"), str) or not all(n is None or files.is_number(n) for n in numbers):
        raise TypeError("the prompt is no text, or a value is no number")
    if not all(type(whole.get(key)) is int for key in ("index", "seed")) or whole["index"] < 0:
        raise TypeError("the index or the seed is no whole number")
    return whole


def _check_length(name: str, values: Tensor, expected: int) -> None:
    if values.shape != (expected,):
        raise RunError(f"held_out '{name}' needs one value a sample, shape ({expected},), got {tuple(values.shape)}.")


def has_pictures(batch: Samples) -> bool:
    """Say whether samples are pictures, not points."""
    return batch.images.ndim == 4 and batch.images.shape[1] in (1, 3)


def _image_name(index: int) -> str:
    return f"images/{index:06d}.png"
