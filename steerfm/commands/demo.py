"""`steerfm demo`: run a list of recipes in one process, from training to the comparison.

The list is recipes/demo/NAME.yaml: stages with a title, a run name, a command, a recipe and overrides. A stage
that is finished is kept unless its recipe or its inputs changed; an interrupted one continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steerfm import config
from steerfm.checking import check_required
from steerfm.commands import common, compare, fitting, generation
from steerfm.config import Composed
from steerfm.errors import ConfigError, nearest
from steerfm.recipe_files import Library
from steerfm.runs import Run, run_fingerprint, set_aside

RUNNERS: dict[str, Callable[[Composed], Path]] = {
    "train": fitting.fit,
    "finetune": fitting.fit,
    "sample": generation.generate,
    "steer": generation.generate,
    "compare": compare.compare,
}


@dataclass(frozen=True)
class Stage:
    """One line of a demo's list; `name` is the run's."""

    title: str
    name: str
    command: str
    recipe: str
    overrides: tuple[str, ...] = ()


def run(arguments: argparse.Namespace) -> int:
    """Run the stages of a demo that are not finished yet; print the comparison and where its page is."""
    started = time.monotonic()
    stages = read(arguments.name, Library(arguments.recipes))
    recipes = [_composed(stage, arguments) for stage in stages]
    common.show_log()
    for i in range(len(stages)):
        _heading(i, len(stages), stages[i].title)
        try:
            _run_stage(stages[i], recipes[i])
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_again(arguments)) from None
    common.console.print(f"All {len(stages)} stages took {_clock(time.monotonic() - started)}.")
    return 0


def read(name: str, library: Library) -> list[Stage]:
    """Return the stages of a demo; raises ConfigError for a demo that is not there or a stage that is wrong."""
    lists = library.options("demo")
    if name not in lists:
        raise ConfigError(f"No demo is named '{name}'{nearest(name, lists) or '.'} There is: {', '.join(lists)}.")
    content = yaml.safe_load(lists[name].read_text(encoding="utf-8"))
    return [_stage(node, f"{lists[name].name}, stage {i + 1}") for i, node in enumerate(content["stages"])]


def _stage(node: dict[str, Any], where: str) -> Stage:
    fields = Stage.__dataclass_fields__
    for key in node:
        if key not in fields:
            raise ConfigError(f"{where}: no such key '{key}'{nearest(key, fields)}")
    check_required(Stage, node, where)
    if node["command"] not in RUNNERS:
        raise ConfigError(f"{where}: command is one of {', '.join(RUNNERS)}, got '{node['command']}'.")
    return Stage(**{**node, "overrides": tuple(node.get("overrides", ()))})


def _composed(stage: Stage, arguments: argparse.Namespace) -> Composed:
    """Compose and check a stage; done for all of them before the first one runs."""
    overrides = [f"recipe={stage.recipe}", f"name={stage.name}", f"folder={arguments.folder}", *stage.overrides]
    return config.compose(stage.command, overrides, folders=arguments.recipes, trusted=arguments.trust)


def _run_stage(stage: Stage, recipe: Composed) -> None:
    root = recipe.values["folder"]
    fingerprint = run_fingerprint(recipe.values, common.inputs(recipe), root)
    if Run.is_done(root, stage.name, fingerprint):
        common.console.print(f"[dim]kept: {Path(root) / stage.name} is finished, and its recipe is unchanged[/dim]")
        if stage.command == "compare":
            compare.show(Path(root) / stage.name)
        return
    if _is_other(root, stage.name, fingerprint):
        common.say(f"Its recipe changed; the earlier run is now {set_aside(root, stage.name)}")
    started = time.monotonic()
    RUNNERS[stage.command](recipe)
    common.console.print(f"[dim]took {_clock(time.monotonic() - started)}[/dim]")


def _is_other(root: str, name: str, fingerprint: str) -> bool:
    """Say whether a run of this name was made, or begun, from another recipe or other inputs."""
    folder = Path(root) / name
    return (folder / "run.json").exists() and Run.open(folder).info.fingerprint != fingerprint


def _heading(i: int, count: int, title: str) -> None:
    common.console.rule(f"[bold]{i + 1}/{count}[/bold]  {title}", align="left")


def _again(arguments: argparse.Namespace) -> str:
    return f"steerfm demo {arguments.name}" + (f" --folder {arguments.folder}" if arguments.folder != "runs" else "")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s" if seconds >= 60 else f"{seconds:.1f} s"
