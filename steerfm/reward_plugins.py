"""Finding what is called a reward: typed as module:function, or offered by an installed package.

Whatever is named here is imported and so runs: no recipe may reach these functions (steerfm.checking.SEALED).
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from steerfm.errors import ConfigError, nearest

GROUP = "steerfm.rewards"  # the entry-point group in which installed packages name their rewards


def plugins() -> dict[str, EntryPoint]:
    """Return the rewards that installed packages offer in the entry-point group "steerfm.rewards", by name.

    Nothing is imported. Where two packages offer one name, the first that Python finds has it.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, entry)
    return dict(sorted(found.items()))


def plugged_in(name: str) -> Any:
    """Return what the plug-in `name` stands for. Raises ConfigError where there is none or its import fails."""
    offered = plugins()
    if name not in offered:
        near = nearest(name, offered) or "."
        raise ConfigError(f"No installed package offers a reward '{name}'{near} Write module:function for your own.")
    try:
        return offered[name].load()
    except Exception as error:  # whatever a foreign package raises while it is imported
        package = getattr(offered[name].dist, "name", "its package")
        text = " ".join(str(error).split())
        raise ConfigError(
            f"The reward '{name}' of the package '{package}' cannot be imported from '{offered[name].value}' "
            f"({type(error).__name__}: {text}): mend or uninstall it."
        ) from error


def import_typed(module_name: str, path: str) -> Any:
    """Return the attribute `path` of a module, which may lie in the current directory. Raises ConfigError."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0]:
            raise ConfigError(f"'{module_name}' imports '{error.name}', which is not installed.") from error
        raise ConfigError(f"No module '{module_name}' in {here} or among the installed packages.") from error
    except ImportError as error:
        raise ConfigError(f"'{module_name}' cannot be imported: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigError(f"'{module_name}' has no '{name}'{nearest(name, vars(found))}")
        found = getattr(found, name)
    return found
