"""Compose a recipe, check every target and argument before anything is built, and build: the one place that does.

Hydra is used here and nowhere else. Only plain dictionaries, lists, numbers and strings leave this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from steerfm import zoo
from steerfm.checking import SPECIAL, check, resolve
from steerfm.errors import ConfigError, SteerfmError, nearest
from steerfm.recipe_files import SHIPPED, Library
from steerfm.reward_plugins import plugins


@dataclasses.dataclass(frozen=True)
class Composed:
    """A recipe with its overrides: plain, complete and checked."""

    recipe: str
    values: dict[str, Any]
    trusted: tuple[str, ...] = ()

    def build(self, key: str, **extra: Any) -> Any:
        """Build what stands under `key` (None where the recipe has nothing there)."""
        return instantiate(self.values.get(key), self.trusted, **extra)

    def named(self, name: str) -> Composed:
        """Return the same recipe for a run of this name."""
        return self.changed(name=name)

    def changed(self, **values: Any) -> Composed:
        """Return the same recipe with other values, which are not checked again."""
        return dataclasses.replace(self, values={**self.values, **values})


def compose(
    command: str, overrides: Sequence[str], *, folders: Sequence[str | Path] = (), trusted: Sequence[str] = ()
) -> Composed:
    """Compose the recipe that `overrides` name, and check all of it; nothing is built.

    `overrides` are Hydra's (`recipe=digits data.batch_size=64`); `folders` hold recipes of the user's beside
    ./recipes; `trusted` are the packages of `--trust`. Raises ConfigError or TrustError, in one sentence.
    """
    library = Library(folders)
    parsed, typed = _named_reward(parse(overrides), library)
    trusted = (*trusted, *typed)
    if trusted:
        import_from_here()
    recipe, composed = _with_overrides(command, parsed, library, trusted)
    values = _complete(composed, recipe, library)
    check(values, trusted)
    return Composed(recipe, values, trusted)


def preview(overrides: Sequence[str], *, folders: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Return a recipe as composed, with `???` where a value is missing; nothing is checked or built."""
    library = Library(folders)
    parsed, _ = _named_reward(parse(overrides), library)
    _, composed = _with_overrides(None, parsed, library, ())
    values = OmegaConf.to_container(composed, resolve=False)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _with_overrides(
    command: str | None, parsed: list[Override], library: Library, trusted: Sequence[str]
) -> tuple[str, Any]:
    """Return the recipe's name and its config with all overrides, each checked; `command` None takes any recipe's."""
    chosen = [override for override in parsed if override.get_key_element().lstrip("+~") in library.groups()]
    recipe = _recipe_name(command or "COMMAND", chosen, library)
    _check_options(chosen, library)
    groups = [override.input_line or "" for override in chosen if override.key_or_group != "recipe"]
    base = _compose([_search_path(library), f"recipe={recipe}", *groups])
    if command is not None:
        _check_command(command, recipe, base)
    lines = [_checked_line(override, base, trusted) for override in parsed if override not in chosen]
    return recipe, _compose([_search_path(library), f"recipe={recipe}", *groups, *lines])


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse `key=value` arguments; raise ConfigError naming the one that is none."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            raise ConfigError(f"'{text}' is not of the form key=value (quote brackets: 'seeds=[0,1]').") from error
    return parsed


def sweep(overrides: Sequence[str]) -> list[tuple[list[str], str]]:
    """Return one (overrides, name suffix) for each point of the product of all `key=a,b` and `range(..)` values."""
    axes: list[list[tuple[str, str]]] = []
    for override in parse(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes.append([(override.input_line or "", "")])
        elif override.is_discrete_sweep():
            axes.append(
                [(f"{key}={value}", f"{key.split('.')[-1]}-{value}") for value in override.sweep_string_iterator()]
            )
        else:
            raise ConfigError(f"'{override.input_line}' has no end of values: list them, as in {key}=0.1,0.2.")
    points = []
    for point in itertools.product(*axes):
        suffix = "-".join(label for _, label in point if label)
        points.append(([line for line, _ in point], re.sub(r"[^\w.+-]+", "_", suffix)))
    return points


def instantiate(node: Any, trusted: Sequence[str] = (), **extra: Any) -> Any:
    """Build a checked part of a recipe, innermost first; `extra` are arguments that a recipe cannot hold.

    `_target_`, `_partial_`, `_args_` and `_recursive_` mean what they mean in Hydra, whose own function is not
    used: every target goes through our trust rule, and its partials are checked anew at every call (0.2 ms).
    A SteerfmError raised by a constructor comes out as it is; any other error becomes a ConfigError.
    """
    if isinstance(node, list):
        return [instantiate(item, trusted) for item in node]
    if not isinstance(node, Mapping):
        return node
    deep = node.get("_recursive_", True)
    values = {key: instantiate(value, trusted) if deep else value for key, value in node.items() if key not in SPECIAL}
    if "_target_" not in node:
        return {**values, **extra}
    target = resolve(node["_target_"], trusted)
    if trusted and "trusted" in inspect.signature(target).parameters:  # FlowMap.load rebuilds a network
        values["trusted"] = tuple(trusted)
    return _call(target, node, values | extra)


def _call(target: Callable[..., Any], node: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """Call a target, or return a partial of it (the target itself, where there is nothing to remember)."""
    positional = node.get("_args_", [])
    if node.get("_partial_"):
        return functools.partial(target, *positional, **values) if positional or values else target
    try:
        return target(*positional, **values)
    except (SteerfmError, ModuleNotFoundError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{node['_target_']} could not be built ({type(error).__name__}): {text}") from error


def import_from_here() -> None:
    """Let Python import modules that lie in the current directory, as `python -m` would."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _named_reward(parsed: list[Override], library: Library) -> tuple[list[Override], list[str]]:
    """Turn `reward=my_rewards:redness`, or the name of an installed package's reward, into a target.

    Whoever types a module, or installed a package and types its name, trusts it.
    """
    for i in range(len(parsed)):
        value = parsed[i].value() if not parsed[i].is_sweep_override() else None
        if parsed[i].key_or_group != "reward" or not isinstance(value, str):
            continue
        if ":" not in value and value not in library.options("reward") and value in plugins():
            value = plugins()[value].value
        if ":" in value:
            module, _, name = value.partition(":")
            import_from_here()
            is_class = inspect.isclass(resolve(f"{module}.{name}", [module]))
            lines = ["reward=custom", f"++reward._target_={module}.{name}", f"++reward._partial_={not is_class}"]
            return [*parsed[:i], *parse(lines), *parsed[i + 1 :]], [module]
    return parsed, []


def _recipe_name(command: str, chosen: list[Override], library: Library) -> str:
    names = [str(override.value()) for override in chosen if override.key_or_group == "recipe"]
    if names:
        return names[-1]
    if command in library.options("recipe"):
        return command
    raise ConfigError(f"Say which recipe: steerfm {command} recipe=NAME (see: steerfm recipes list).")


def _check_options(chosen: list[Override], library: Library) -> None:
    """Check that each chosen option of a group, `network=unet` say, is there."""
    for override in chosen:
        group, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}' gives several values: add -m to run each of them.")
        options = library.options(group)
        if override.is_delete() or (isinstance(value, str) and value in options):
            continue
        if value is None:
            raise ConfigError(
                f"{group} is a choice of parts, and null is none of them: to leave it out, write ~{group}."
            )
        if group == "recipe":
            raise ConfigError(f"No recipe is named '{value}'{nearest(str(value), options)} See: steerfm recipes list.")
        raise ConfigError(
            f"{group} has no option '{value}'{nearest(str(value), options) or '.'} It has: {', '.join(options)}."
        )


def _check_command(command: str, recipe: str, base: Any) -> None:
    written: Any = OmegaConf.to_container(base, resolve=False)  # with ${...} as it stands: here it could read anything
    wanted = written.get("command")
    if wanted != command:
        said = " ".join(str(wanted).split())
        raise ConfigError(f"'{recipe}' is a recipe for another command: steerfm {said} recipe={recipe}")


@contextlib.contextmanager
def _without_environment() -> Iterator[None]:
    """Refuse ${oc.env:NAME} in the block: what a recipe read so would lie in the run folder, and could be sent away."""

    def refuse(name: str, default: Any = None) -> Any:
        raise ConfigError(f"A recipe may not read the environment, and this one asks for {name}: pass it as key=value.")

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _compose(overrides: Sequence[str]) -> Any:
    """Return Hydra's composed config (an OmegaConf object: it must not leave this file).

    In a recipe `${zoo:shapes32}` is the folder of a model that ships with the package.
    """
    OmegaConf.register_new_resolver("zoo", lambda name: str(zoo.folder(name)), replace=True)
    try:
        with hydra.initialize_config_module(version_base="1.3", config_module=SHIPPED), _without_environment():
            return hydra.compose("main", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise ConfigError(f"The recipe does not compose: {' '.join(str(cause).split())}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"A file of the recipe is no YAML ({' '.join(str(error).split())}): mend it there; a text that holds ': ' "
            "needs quotes."
        ) from error
    except Exception as error:  # what a damaged recipe makes Hydra raise is anybody's guess
        raise ConfigError(
            f"The recipe does not compose ({type(error).__name__}): {' '.join(str(error).split())}"
        ) from error


def _search_path(library: Library) -> str:
    """Return the override that lets Hydra see the user's folders."""
    quoted = ",".join(f"'file://{folder}'" for folder in library.own)
    return f"hydra.searchpath=[{quoted}]"


def _checked_line(override: Override, base: Any, trusted: Sequence[str]) -> str:
    """Return the override as Hydra takes it, once its key is known to exist (or to be an argument left out)."""
    line, key = override.input_line or "", override.key_or_group
    if override.is_sweep_override():
        raise ConfigError(f"'{line}' gives several values: add -m to run each, or use brackets for a list.")
    if line.startswith(("+", "~")):
        return line
    raw = OmegaConf.to_container(base, resolve=False)
    node, walked = raw, []
    for part in key.split("."):
        alias = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        if alias:
            rest = ".".join([alias[1], *key.split(".")[len(walked) :]])
            raise ConfigError(f"'{'.'.join(walked)}' is taken from '{alias[1]}': write {rest}=... instead of '{line}'.")
        found, node = _child(node, part)
        if not found:
            return _left_out(line, part, walked, node, trusted)
        walked.append(part)
    return line


def _child(node: Any, part: str) -> tuple[bool, Any]:
    """Return (True, the child named `part`), or (False, the node itself)."""
    if isinstance(node, dict) and part in node:
        return True, node[part]
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return True, node[int(part)]
    return False, node


def _left_out(line: str, part: str, walked: list[str], node: Any, trusted: Sequence[str]) -> str:
    """Allow an argument that the recipe left out but the target takes; else raise ConfigError."""
    parent = ".".join(walked) or "the recipe"
    choices = [str(name) for name in node if name not in SPECIAL] if isinstance(node, dict) else []
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        target = resolve(node["_target_"], trusted)
        parameters = inspect.signature(target).parameters
        if part in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return f"++{line}"
        choices = list(parameters)
    known = f" It has: {', '.join(choices)}." if choices else ""
    raise ConfigError(f"'{line}': {parent} has no '{part}'{nearest(part, choices) or '.'}{known}")


def _complete(config: Any, recipe: str, library: Library) -> dict[str, Any]:
    """Return the config as plain containers, or raise ConfigError for a value that the user must give."""
    missing = list(_missing(OmegaConf.to_container(config, resolve=False)))
    if missing:
        example = _example(missing[0], library)
        raise ConfigError(f"Recipe '{recipe}' needs a value for '{missing[0]}': add {example}")
    try:
        with _without_environment():
            values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"Recipe '{recipe}': {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    except RecursionError as error:
        raise ConfigError(f"Recipe '{recipe}' is nested too deeply: look for a ${{...}} that holds itself.") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _missing(node: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys whose value is `???`."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield from _missing(value, f"{key}.{name}" if key else str(name))
    if node == "???":
        yield key


def _example(key: str, library: Library) -> str:
    """Return an example for a missing value: the comment behind its `???` in a recipe or a part."""
    pattern = re.compile(rf"^\s*{re.escape(key.split('.')[-1])}:\s*\?\?\?\s*#\s*(.+)$", re.MULTILINE)
    for folder in [*library.own, library.shipped]:
        for path in sorted(folder.rglob("*.yaml")):
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            if found:
                return f"{key}={found[1].strip()}"
    return f"{key}=VALUE"
