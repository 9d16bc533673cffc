"""What both sides of the comparison with AlignProp do alike; it needs the standard library and torch alone."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def begin() -> tuple[Path, dict[str, Any]]:
    """Return the folder that the command line names and the task in it, and go on with one thread."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    return folder, json.loads((folder / "task.json").read_text(encoding="utf-8"))


def resident() -> int:
    """Return the most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def finish(folder: Path, figures: dict[str, Any], libraries: Sequence[str]) -> None:
    """Write figures.json, with the versions of the libraries."""
    figures |= {name: importlib.metadata.version(name) for name in libraries}
    (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
