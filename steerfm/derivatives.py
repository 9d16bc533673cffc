"""Directional derivatives of a network, in forward mode or by central differences: one place for their traps.

Forward mode cannot pass through flash attention (the math kernel is used around it), a few layers have no
forward rule (the error names them), and torch.no_grad does not stop a tangent (detach does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steerfm.errors import ConfigError, DerivativeError

Method = Literal["forward", "central"]


def directional_derivative(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *,
    method: Method = "forward",
    step: float = 1e-2,
    network: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `function(*primals)` and its derivative along `tangents`, both of the function's shape.

    method: "forward" (exact, one pass) or "central" ((f(p + h d) - f(p - h d)) / 2h, error of order h^2, two
    more passes, works through every layer and under torch.compile). step: h. Gradients flow through both
    results. Raises DerivativeError, naming the layer of `network`, where forward mode alone is impossible.
    """
    if method == "central":
        plus = function(*(p + step * d for p, d in zip(primals, tangents, strict=True)))
        minus = function(*(p - step * d for p, d in zip(primals, tangents, strict=True)))
        return function(*primals), (plus - minus) / (2 * step)
    if method != "forward":
        raise ConfigError(f"A derivative's method is 'forward' or 'central', got '{method}'.")
    for primal in primals:
        if primal.ndim == 0:
            raise DerivativeError("Forward mode needs batch-shaped times: got a tensor without dimensions.")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            value, derivative = torch.func.jvp(function, tuple(primals), tuple(tangents))  # type: ignore[misc]
            return value, derivative
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        layer = _failing_layer(function, primals, tangents, network)
        if layer is None:
            raise
        raise DerivativeError(
            f"Forward mode cannot pass through {layer} ({str(error).splitlines()[0]}): "
            "replace the layer, or use derivative='central'."
        ) from error


def _failing_layer(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    network: nn.Module | None,
) -> str | None:
    """Run forward mode once more and return "'blocks.0.norm' (BatchNorm1d)", the innermost layer that failed.

    A function that fails without tangents too raises here what it raises by itself.
    """
    if network is None:
        return None
    with torch.no_grad():
        function(*primals)
    inside: list[str] = []
    names = {module: name for name, module in network.named_modules()}
    enter = [m.register_forward_pre_hook(lambda m, _: inside.append(names[m])) for m in names]
    leave = [m.register_forward_hook(lambda *_: _drop_last(inside)) for m in names]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(function, tuple(primals), tuple(tangents))
    except (RuntimeError, NotImplementedError):
        if inside:
            layer = network.get_submodule(inside[-1])
            return f"'{inside[-1] or 'network'}' ({type(layer).__name__})"
    finally:
        for handle in enter + leave:
            handle.remove()
    return None


def _drop_last(items: list[str]) -> None:
    items.pop()
