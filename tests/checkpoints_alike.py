"""Whether two runs are the same, bit by bit: what they saved, and all that their last checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steerfm.callbacks.checkpoints import newest_first


def alike(a: Path, b: Path) -> bool:
    """Say whether two folders hold safetensors of the same names and bits."""
    first, second = ({path.name: load_file(path) for path in folder.glob("*.safetensors")} for folder in (a, b))
    return bool(first) and not list(unequal(first, second))


def differences(a: Path, b: Path) -> list[str]:
    """Return where the saved map and the last checkpoint of two runs differ: weights, averages, optimiser, schedule,
    random generators, place in the data.
    """
    found = [] if alike(a / "map", b / "map") else ["map"]
    checkpoints = [torch.load(newest_first(run / "checkpoints")[0], weights_only=True) for run in (a, b)]
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(checkpoints[0])
    return found + list(unequal(*checkpoints))


def unequal(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Yield the places at which nested data differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            yield place
    elif isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{place}: {sorted(map(str, set(a) ^ set(b)))}"
        for key in a.keys() & b.keys():
            yield from unequal(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            yield place
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from unequal(x, y, f"{place}/{i}")
    elif a != b and not (a != a and b != b):
        yield f"{place}: {a!r} and {b!r}"
