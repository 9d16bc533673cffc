"""Run the losses of a training step by torch.compile, once they have shown that they are the same so."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.types import Condition, Values

log = logging.getLogger(__name__)

TOLERANCE = 0.02  # relative; rounding, bfloat16's too, stays below it, and a derivative that got lost does not
OPTIONS = {
    "fallback_random": True,  # dropout draws what it draws uncompiled
    "cpp.use_decompose_tanh": True,  # by one exponential, to 1e-7, which makes GELU cheap
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
}


class Compiler:
    """Call functions of tensors through torch.compile, or as they are where that fails, which one log line says.

    parameters: gives those that the losses are differentiated in. A function's first batch is worked out both ways:
    an error in the compiled forward or backward pass, or another gradient than the plain one's (Dynamo may drop a
    derivative without a word), and the function runs as it is from then on. Every shape is compiled anew, and a number
    that changes (the training step) once more.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        self.parameters = parameters
        self._ways: dict[int, Callable[..., Values]] = {}

    def __call__(self, function: Callable[..., Values], *arguments: Any) -> Values:
        """Return function(*arguments), losses of shape (B,)."""
        arguments = tuple(_as_input(argument) for argument in arguments)
        if id(function) not in self._ways:
            self._ways[id(function)] = self._way(function, arguments)
        return self._ways[id(function)](*arguments)

    def _way(self, function: Callable[..., Values], arguments: tuple[Any, ...]) -> Callable[..., Values]:
        if not _has_compiler(arguments):
            if not self._ways:
                log.warning("No C++ compiler was found, so training is not compiled: install g++, or set CXX.")
            return function
        log.info("Compiling %s: a minute or two.", name_of(function))
        compiled = torch.compile(function, options=dict(OPTIONS))
        trained = [p for p in self.parameters() if p.requires_grad]
        with _moved(trained):
            wanted = _losses_and_gradient(function, arguments, trained)
            try:
                reason = _difference(wanted, _losses_and_gradient(compiled, arguments, trained))
            except Exception as error:  # whatever it is, the plain function has just shown that it works
                reason = _first_line(error)
        if reason is None:
            return compiled
        central = getattr(function, "derivative", "") == "forward"
        hint = " With derivative='central' it may compile." if central else ""
        log.warning("%s is not compiled (%s).%s", name_of(function), reason, hint)
        return function


def name_of(function: Callable[..., Any]) -> str:
    """Return what a function, or an object that is called, is named in a log or an error."""
    return getattr(function, "__name__", type(function).__name__)


def _as_input(argument: Any) -> Any:
    """Return tensors contiguous, as forward mode needs times under torch.compile, and of a shape that stays."""
    if isinstance(argument, Condition):
        return Condition({name: _as_input(tensor) for name, tensor in argument.tensors.items()})
    if not isinstance(argument, Tensor):
        return argument
    argument = argument.contiguous()
    torch._dynamo.mark_static(argument)  # training has few shapes, and code for any shape is slower
    return argument


def _has_compiler(arguments: tuple[Any, ...]) -> bool:
    if any(isinstance(a, Tensor) and a.device.type != "cpu" for a in arguments):
        return True
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which((os.environ.get("CXX") or usual).split()[0]) is not None


@contextlib.contextmanager
def _moved(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Move parameters a little inside the block: where a last layer starts at zero, so does every derivative.

    Autograd does not notice (`data`), so that what this step has worked out before can still go backward.
    """
    generator, own = torch.Generator().manual_seed(0), [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = p.data + 0.02 * torch.randn(p.shape, generator=generator).to(p.data)
        yield
    finally:
        for p, data in zip(parameters, own, strict=True):
            p.data = data


def _losses_and_gradient(
    function: Callable[..., Values], arguments: tuple[Any, ...], trained: list[nn.Parameter]
) -> list[Tensor]:
    """Return the losses and the gradient of their mean in each parameter; random states stay as they are."""
    own = (a.clone_state() if isinstance(a, torch.Generator) else a for a in arguments)
    with torch.random.fork_rng({p.device for p in trained if p.device.type == "cuda"}):
        losses = function(*own)
        gradient = torch.autograd.grad(losses.mean(), trained, allow_unused=True, materialize_grads=True)
    return [losses.detach(), *gradient]


def _difference(wanted: list[Tensor], got: list[Tensor]) -> str | None:
    """Return how far losses and gradient are off, in words; None where they agree."""
    for what, a, b in (("losses", wanted[:1], got[:1]), ("gradient", wanted[1:], got[1:])):
        size = sum(float(x.double().square().sum()) for x in a) ** 0.5
        gap = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5
        if not gap <= TOLERANCE * size:
            return f"its {what} would be off by {gap:.1e}, of {size:.1e}"
    return None


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # of a backend
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
