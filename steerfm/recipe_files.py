"""Recipes as they lie on disk, the shipped ones and the user's: found by name, and looked through before use."""

from __future__ import annotations

import contextlib
import importlib.resources
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steerfm.errors import ConfigError
from steerfm.files import check_yaml

SHIPPED = "steerfm.recipes"


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it lies on disk: its name for `recipe=`, its path, and its opening comment."""

    name: str
    path: Path
    header: tuple[str, ...]


class Library:
    """The folders in which recipes and parts are looked for: the shipped one first, then the user's."""

    def __init__(self, folders: Sequence[str | Path] = ()) -> None:
        self.shipped = Path(str(importlib.resources.files(SHIPPED)))
        self.own = [folder for folder in _own_folders(folders) if not folder.samefile(self.shipped)]
        for folder in self.own:
            _check_folder(folder, self.shipped)

    def groups(self) -> list[str]:
        """Return the names of the config groups, such as network and trainer."""
        folders = [self.shipped, *self.own]
        return sorted({path.name for folder in folders for path in folder.iterdir() if _is_group(path)})

    def options(self, group: str) -> dict[str, Path]:
        """Return the files of a group by option name, such as {"points/moons": .../recipe/points/moons.yaml}."""
        found: dict[str, Path] = {}
        for folder in [self.shipped, *self.own]:
            base = folder / group
            for path in sorted(base.rglob("*.yaml")):
                found.setdefault(path.relative_to(base).with_suffix("").as_posix(), path)
        return found

    def recipes(self) -> list[RecipeFile]:
        """Return every recipe, by name."""
        return [RecipeFile(name, path, header(path)) for name, path in sorted(self.options("recipe").items())]


def header(path: Path) -> tuple[str, ...]:
    """Return the opening comment of a recipe, line by line, without Hydra's own `# @package`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return tuple(line.lstrip("# ").rstrip() for line in lines if not line.startswith("# @"))


def _own_folders(folders: Sequence[str | Path]) -> list[Path]:
    given = [Path(folder).expanduser().resolve() for folder in folders]
    for folder in given:
        if not folder.is_dir():
            raise ConfigError(f"--recipes {folder}: no such folder.")
    here = Path("recipes").resolve()
    return [*given, here] if here.is_dir() and here not in given else given


def _check_folder(folder: Path, shipped: Path) -> None:
    """Refuse a file of the user's that a shipped one of the same name and other content would hide, or a harmful one.

    A file that cannot be read, or is no YAML, is named when it is used.
    """
    for path in sorted(folder.rglob("*.yaml")):
        ours = shipped / path.relative_to(folder)
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            if ours.is_file() and ours.read_bytes() != path.read_bytes():
                raise ConfigError(
                    f"{path} has the name of a recipe that ships with steerfm and wins over it: rename it."
                )
            text = path.read_text(encoding="utf-8")
            try:
                check_yaml(text)
            except ValueError as error:
                raise ConfigError(f"{path} is no recipe ({error}): mend it.") from error
            _check_defaults(path, text)


def _check_defaults(path: Path, text: str) -> None:
    """Raise ConfigError where the defaults of a recipe lead out of the folders of recipes, to any YAML on the disk."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        leads = [event.value for event in _scalars(value) if ".." in re.split(r"[/\\\s@]+", event.value)]
        if key.value == "defaults" and leads:
            raise ConfigError(
                f"{path} takes '{leads[0]}' among its defaults: write it from the top, as in /network: dit."
            )


def _scalars(node: Any) -> Iterator[Any]:
    """Yield the scalars of a YAML node, and the keys of its mappings."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for each in child if isinstance(child, tuple) else (child,):
            yield from _scalars(each)


def _is_group(path: Path) -> bool:
    return path.is_dir() and path.name != "demo" and any(path.rglob("*.yaml"))
