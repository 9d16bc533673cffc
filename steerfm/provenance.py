"""Say what a run was made from: a fingerprint of its config and inputs, versions, and the state of the code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerfm.errors import RunError

PACKAGES = ("steerfm", "torch", "lightning")
GIT_SECONDS = 5.0  # a huge checkout on a slow disk must not hold up a run


def plain(value: Any, where: str = "config") -> Any:
    """Return `value` as dictionaries, lists, strings, numbers, booleans and None only.

    Raises RunError, naming the place, for anything that would not come back from YAML and JSON as it was.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise RunError(
        f"{where} is a {type(value).__name__}, and a run keeps plain values only: "
        "convert it to numbers, strings, lists and dictionaries first."
    )


def fingerprint(config: Mapping[str, Any], inputs: Sequence[str] = ()) -> str:
    """Return the SHA-256 of a config and of the fingerprints of what it reads, in order; 64 hex digits.

    The order of the config's keys does not matter.
    """
    text = json.dumps({"config": plain(config), "inputs": list(inputs)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_state(folder: str | Path = ".") -> dict[str, Any]:
    """Return {"commit": ..., "dirty": ...} of the checkout around `folder`, or {} where there is none.

    A git that is missing or too slow counts as no checkout.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if commit is None or changes is None:
        return {}
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(folder: str | Path, *arguments: str) -> str | None:
    """Return what git prints, or None if it fails."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", os.fspath(folder), *arguments]  # it could name a program
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, env=environment, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout
