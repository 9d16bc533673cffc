"""Modules that hold the very same parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def copy_around(module: _Module, shared: Iterable[nn.Parameter] | None = None) -> _Module:
    """Return a copy of a module that holds the very parameters `shared`, all by default, and copies of all else.

    Both move to another device together, since modules move what is in a parameter and keep the parameter. Buffers are
    copied.
    """
    kept = module.parameters() if shared is None else shared
    return copy.deepcopy(module, {id(parameter): parameter for parameter in kept})
