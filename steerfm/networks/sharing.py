"""Modules that hold the very same parameters, or lend them to another device for a call."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

_Module = TypeVar("_Module", bound=nn.Module)


def copy_around(module: _Module, shared: Iterable[nn.Parameter] | None = None) -> _Module:
    """Return a copy of a module that holds the very parameters `shared`, all by default, and copies of all else.

    Both move to another device together, since modules move what is in a parameter and keep the parameter. Buffers are
    copied.
    """
    kept = module.parameters() if shared is None else shared
    return copy.deepcopy(module, {id(parameter): parameter for parameter in kept})


def called_on(device: torch.device, module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Return module.method(*args, **kwargs) worked out on `device`, with the module's tensors left where they are.

    What is copied to the device lives as long as the result's graph does: in a checkpointed call, until its backward
    pass is over.
    """
    call = _Call(module, method)
    lent = {name: each.to(device) for name, each in chain(call.named_parameters(), call.named_buffers())}
    return functional_call(call, lent, args, kwargs)


class _Call(nn.Module):
    """Call a method of a module as functional_call calls modules."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)
