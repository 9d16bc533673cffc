"""Check a recipe before anything is built: may each target be named, and does it take what it is given?"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerfm.building import check_arguments
from steerfm.building import resolve as resolve_trusted
from steerfm.errors import ConfigError, SteerfmError, TrustError, nearest

SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
SEALED = (  # what imports by name, runs a command, opens a port, asks an address, or writes or moves files
    "steerfm.backbones.export",
    "steerfm.backbones.export_check",
    "steerfm.backbones.hub",
    "steerfm.backbones.lora_files",
    "steerfm.backbones.pipeline_files",
    "steerfm.building",
    "steerfm.callbacks.checkpoints.Checkpoints",
    "steerfm.callbacks.sample_grid.keep_picture",
    "steerfm.callbacks.stop_on_signal",
    "steerfm.checking",
    "steerfm.cli",
    "steerfm.commands",
    "steerfm.config",
    "steerfm.data.latents.cache_latents",
    "steerfm.files",
    "steerfm.http_client",
    "steerfm.images.save_png",
    "steerfm.modules.common.save_averaged",
    "steerfm.names",
    "steerfm.provenance",
    "steerfm.records",
    "steerfm.report",
    "steerfm.reward.load_reward",
    "steerfm.reward_plugins",
    "steerfm.reward_server",
    "steerfm.reward_wire",
    "steerfm.runs",
    "steerfm.saving",
)
REFUSED = {"lightning.pytorch.loggers.WandbLogger": ("settings",)}  # could send the key to another server


def check(values: Mapping[str, Any], trusted: Sequence[str] = ()) -> None:
    """Check that every `_target_` may be used and takes the arguments that stand beside it; build nothing."""
    _check_plain(values, "")
    for key, node in targets(values):
        name = node["_target_"]
        if not isinstance(name, str):
            raise ConfigError(f"{key}._target_ must be a dotted path, got {name!r}.")
        if "trusted" in node:
            raise TrustError(f"{key}.trusted stands in the recipe: trust is given on the command line, with --trust.")
        _check_special(node, key)
        try:
            target = resolve(name, trusted)
            arguments = {argument: value for argument, value in node.items() if argument not in SPECIAL}
            check_arguments(target, arguments, name)
            if not node.get("_partial_"):
                check_required(target, arguments, name)
            check_types(target, arguments, key)
        except SteerfmError as error:
            text = str(error)
            raise type(error)(text if text.startswith(key) else f"{key}: {text}") from error


def _check_plain(node: Any, key: str) -> None:
    """Raise ConfigError for a value that is none of JSON's, such as YAML's !!binary."""
    if isinstance(node, Mapping | list):
        for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            _check_plain(value, f"{key}.{name}" if key else str(name))
    elif not isinstance(node, bool | int | float | str | None):
        raise ConfigError(f"{key} is a {type(node).__name__}: a recipe holds numbers, texts, lists and mappings.")


def _check_special(node: Mapping[str, Any], key: str) -> None:
    """Raise ConfigError for a special key of the wrong type, TrustError for an argument that no recipe may give."""
    if not isinstance(node.get("_args_", []), list):
        raise ConfigError(f"{key}._args_ must be a list, got {node['_args_']!r}.")
    for name in ("_partial_", "_recursive_"):
        if not isinstance(node.get(name, False), bool):
            raise ConfigError(f"{key}.{name} must be true or false, got {node[name]!r}.")
    for name in REFUSED.get(node["_target_"], ()):
        if name in node:
            raise TrustError(f"{key}.{name} is not for recipes to give: set what you need in the environment.")


def targets(node: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every (dotted key, dictionary) that names a `_target_`, outermost first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, value in node.items():
            yield from targets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i in range(len(node)):
            yield from targets(node[i], f"{key}.{i}")


def resolve(name: str, trusted: Sequence[str] = ()) -> Any:
    """Return what a dotted path names, under the trust rule.

    Refuses what would itself import by name, run commands, open a port or write files: a recipe could trust for its
    user so. A module that cannot be imported, or what says nothing of its arguments, is a ConfigError; a missing
    package is not, since the command line names its extra.
    """
    try:
        found = resolve_trusted(name, trusted)
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        raise ConfigError(f"'{name}' cannot be imported: {error}") from error
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}."
    if home.startswith(tuple(f"{sealed}." for sealed in SEALED)):
        raise TrustError(
            f"'{name}' imports, runs, serves, asks or writes what it is told to, so a recipe may not name it."
        )
    try:
        inspect.signature(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"'{name}' does not say which arguments it takes, so none can be checked.") from error
    return found


def check_required(target: Callable[..., Any], given: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError for an argument without a default that is not among the `given`."""
    for parameter in inspect.signature(target).parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in given:
            raise ConfigError(f"{name} needs the argument '{parameter.name}'.")


def check_types(target: Callable[..., Any], given: Mapping[str, Any], key: str) -> None:
    """Raise ConfigError for a plain value that is obviously of the wrong type; say nothing where unsure.

    Args:
        target: a class or function with annotations.
        given: its arguments by name, plain values as a recipe holds them.
        key: where they stand in the recipe, for the message.
    """
    parameters = inspect.signature(target).parameters
    for name, value in given.items():
        if name not in parameters or isinstance(value, Mapping):
            continue
        annotation = _evaluated(parameters[name].annotation, target)
        if not _fits(value, annotation):
            raise ConfigError(f"{key}.{name} must be {_words(annotation)}, got {value!r}{_hint(value, annotation)}.")


def _evaluated(annotation: Any, target: Callable[..., Any]) -> Any:
    """Return the annotation as an object; Any where it cannot be had (names imported for type checkers only)."""
    if annotation is inspect.Parameter.empty:
        return Any
    function = inspect.unwrap(target.__init__) if inspect.isclass(target) else inspect.unwrap(target)
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}))["value"]
    except Exception:  # whatever a foreign annotation raises, it says nothing about the value
        return Any


def _fits(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if annotation is Path:
        return isinstance(value, str)
    if isinstance(value, (bool, int, float, str)) and inspect.isclass(annotation):
        return _is_instance(value, annotation)  # a bare value where an object is wanted
    return True


def _is_instance(value: Any, annotation: type) -> bool:
    try:
        return isinstance(value, annotation)
    except TypeError:  # a Protocol that cannot be checked at run time
        return False


def _words(annotation: Any) -> str:
    """Return the annotation as a person would say it."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(member) for member in typing.get_args(annotation))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}
    return names.get(annotation) or f"a {getattr(annotation, '__name__', str(annotation))}"


def _hint(value: Any, annotation: Any) -> str:
    choices = [choice for choice in typing.get_args(annotation) if isinstance(choice, str)]
    return nearest(value, choices).rstrip("?") if isinstance(value, str) else ""
