"""Small trained models that ship with the package, in half precision, and the recipes that made them.

`make zoo` trains them again, measures them (benchmarks/shapes.py) and puts them here; figures.json says what was
measured, on which data, and between which bounds a model made anew must land.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerfm.errors import ConfigError, nearest

HERE = Path(__file__).parent
MAPS = {"shapes32": "shapes"}  # name and recipe
CLIPS = {"shapes32_clip": "shapes_clip"}


def folder(name: str, among: Mapping[str, str] | None = None) -> Path:
    """Return the folder of a model; raises ConfigError for a name that is not there."""
    models = {**MAPS, **CLIPS} if among is None else among
    if name not in models:
        near = nearest(name, models) or "."
        raise ConfigError(f"Nothing in the zoo is called '{name}'{near} There is: {', '.join(models)}.")
    return HERE / name


def figures(name: str) -> dict[str, Any]:
    """Return what was measured of a model, by figure: its value, its bounds [low, high] and its sample size."""
    measured = json.loads((HERE / "figures.json").read_text(encoding="utf-8"))
    return measured[folder(name).name]
