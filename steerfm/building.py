"""Dotted paths, trusted or not, and objects as plain descriptions.

One function, `resolve`, turns every dotted path into an object, from recipes and from a saved map's JSON
alike. Allowed by name: everything public in steerfm, and the short list below. A description is a plain
dictionary {"_target_": "steerfm.networks.mlp.MLP", "width": 256, ...} that `build` turns back into an object; of
steerfm it may name only what `describe` writes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from steerfm.errors import CheckpointError, ConfigError, TrustError, nearest

ALLOWED_MODULES = ("torch.optim", "torch.optim.lr_scheduler")  # their public classes, not their sub-modules
ALLOWED_NAMES = (
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.RichProgressBar",
    "lightning.pytorch.callbacks.TQDMProgressBar",
)

_Class = TypeVar("_Class", bound=type)


def is_trusted(dotted: str, trusted: Sequence[str] = ()) -> bool:
    """Say whether `dotted` may be imported: steerfm itself, the allowed list, or a package the user trusts."""
    if not _is_public(dotted):
        return False
    parts = dotted.split(".")
    if parts[0] == "steerfm" or parts[0] in trusted or any(dotted.startswith(f"{name}.") for name in trusted):
        return True
    return dotted in ALLOWED_NAMES or ".".join(parts[:-1]) in ALLOWED_MODULES


def _is_public(dotted: str) -> bool:
    return all(part.isidentifier() and not part.startswith("_") for part in dotted.split("."))


def resolve(dotted: str, trusted: Sequence[str] = ()) -> Any:
    """Return the class or function that `dotted` names, such as "steerfm.FlowMap.load".

    Nothing that is not trusted is imported. What a trusted module merely imports from elsewhere (its `os`,
    say) is not reachable through it, nor is a method that a class of ours inherits from elsewhere. Of a class only
    what makes one is (FlowMap.load), for a method could be handed any object, and of other objects nothing, unless
    the user trusts the package. Raises TrustError for an untrusted path, ConfigError for a missing one.
    """
    if not is_trusted(dotted, trusted):
        package = dotted.split(".")[0]
        if not _is_public(dotted):
            raise TrustError(
                f"'{dotted}' has a part that is private or no name, and such a path is never imported: "
                "give the class a public name in a module of its own."
            )
        raise TrustError(
            f"'{dotted}' is not on the list of trusted names, so it was not imported. "
            f"If you wrote it or trust who did, allow its package: --trust {package}"
        )
    owner, names = _import_longest(dotted)
    for name in names:
        if not hasattr(owner, name):
            where = getattr(owner, "__name__", dotted)
            raise ConfigError(f"'{where}' has no '{name}' (from '{dotted}'){nearest(name, dir(owner))}")
        if not _of_users(dotted, trusted) and not _is_open(owner, name):
            raise TrustError(f"'{dotted}' is a method or an attribute: name a class, what makes one, or a function.")
        owner = getattr(owner, name)
        if inspect.ismodule(owner) and not is_trusted(owner.__name__, trusted):
            raise TrustError(f"'{dotted}' leads out of trusted code to the module '{owner.__name__}'.")
    _check_home(owner, dotted, trusted)
    return owner


def _import_longest(dotted: str) -> tuple[Any, list[str]]:
    """Import the longest module prefix of `dotted`; return it and the names that are left."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        module_name = ".".join(parts[:i])
        try:
            return importlib.import_module(module_name), parts[i:]
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
                raise  # the module exists, something that it imports does not
    raise ConfigError(f"No module named '{parts[0]}' (from '{dotted}'): is it installed?")


def _check_home(target: Any, dotted: str, trusted: Sequence[str]) -> None:
    """Refuse a name that a trusted module only borrowed from an untrusted one."""
    home = getattr(target, "__module__", None)
    if not callable(target) or home is None:
        raise ConfigError(f"'{dotted}' names {type(target).__name__}, and a class or function is needed.")
    package = home.split(".")[0]
    optimizer = package == "torch" and dotted.startswith("torch.optim.") and inspect.isclass(target)
    ours = package == "steerfm" and _is_public(home)
    if ours or dotted in ALLOWED_NAMES or optimizer or _of_users(home, trusted):
        return
    raise TrustError(f"'{dotted}' is only borrowed from '{home}', which is not trusted: --trust {package}")


def _of_users(dotted: str, trusted: Sequence[str]) -> bool:
    """Say whether a name is of a package, or of one with a module, that the user trusts."""
    return dotted.split(".")[0] in {name.split(".")[0] for name in trusted}


def _is_open(owner: Any, name: str) -> bool:
    """Say whether a path may go on from `owner` to its attribute: into a module, or to what makes a class's objects."""
    if inspect.ismodule(owner):
        return True
    found = inspect.getattr_static(owner, name, None) if inspect.isclass(owner) else None
    return isinstance(found, (classmethod, staticmethod)) or inspect.isclass(found)


def remembered(cls: _Class) -> _Class:
    """Let instances of a class remember the arguments they were made with, for `describe` (a class decorator)."""
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:
            bound = inspect.signature(original).bind(self, *args, **kwargs)
            object.__setattr__(self, "_arguments", _by_name(bound))
        original(self, *args, **kwargs)

    init.remembers = cls  # type: ignore[attr-defined]
    cls.__init__ = init
    return cls


def is_remembered(cls: type) -> bool:
    """Say whether instances of exactly this class remember their arguments."""
    return getattr(cls.__init__, "remembers", None) is cls


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any] | None:
    """Return the arguments after the first by name, or None where one was given that no name can give back."""
    arguments: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            return None
        arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return arguments


def describe(obj: Any) -> Any:
    """Return `obj` as plain JSON-able data that `build` turns back into an equal object.

    Objects are those of a `@remembered` class or a dataclass; numbers, strings, lists and dictionaries stand
    for themselves. Raises CheckpointError for anything else.
    """
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, (list, tuple)):
        return [describe(item) for item in obj]
    if isinstance(obj, Mapping):
        return {str(key): describe(value) for key, value in obj.items()}
    if hasattr(obj, "tolist"):  # tensors and arrays
        return obj.tolist()
    if getattr(obj, "_arguments", None) is not None:
        arguments = obj._arguments
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        arguments = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if f.init}
    else:
        raise CheckpointError(
            f"{type(obj).__qualname__} does not remember its arguments, so it cannot be saved as data: "
            "decorate the class with @steerfm.remembered, or make it a dataclass."
        )
    target = f"{type(obj).__module__}.{type(obj).__qualname__}"
    return {"_target_": target, **{name: describe(value) for name, value in arguments.items()}}


def build(description: Any, trusted: Sequence[str] = ()) -> Any:
    """Return the object that a description stands for; every dotted path goes through `resolve`.

    Raises TrustError for what is no class, or a class of steerfm's that `describe` never writes: a saved map has no
    business with a reward that asks a server, or with a trainer.
    """
    if isinstance(description, Mapping):
        values = {key: build(value, trusted) for key, value in description.items() if key != "_target_"}
        if "_target_" not in description:
            return values
        target = resolve(description["_target_"], trusted)
        if not isinstance(target, type):
            raise TrustError(f"'{description['_target_']}' is not a class, and saved data may only name classes.")
        if not (is_remembered(target) or dataclasses.is_dataclass(target) or _of_users(target.__module__, trusted)):
            raise TrustError(f"'{description['_target_']}' is no part of a map, and saved data may only name those.")
        check_arguments(target, values, description["_target_"])
        return target(**values)
    if isinstance(description, (list, tuple)):
        return [build(item, trusted) for item in description]
    return description


def check_arguments(target: Callable[..., Any], given: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError if `target` does not take one of the `given` arguments, with the nearest right name."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in given:
        if key not in parameters:
            choices = ", ".join(parameters)
            raise ConfigError(f"{name} takes no argument '{key}'{nearest(key, parameters) or '.'} It takes: {choices}.")
