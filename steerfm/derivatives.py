"""Directional derivatives of a network, in forward mode or by central differences: one place for their traps.

Forward mode cannot pass through flash attention (the math kernel is used around it), a few layers have no
forward rule (the error names them), torch.no_grad does not stop a tangent (detach does), and a gradient that
goes back through the tangent of PyTorch's layer norm is wrong (its definition is used in its place).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

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
    more passes, works through every layer). step: h. Gradients flow through both results. Autocast is off inside: a
    difference of two bfloat16 numbers is mostly rounding. Raises DerivativeError, naming the layer of `network`,
    where forward mode alone is impossible.
    """
    check_derivative(method, step)
    with torch.autocast(primals[0].device.type, enabled=False):
        if method == "forward":
            return _forward(function, primals, tangents, network)
        plus = function(*(p + step * d for p, d in zip(primals, tangents, strict=True)))
        minus = function(*(p - step * d for p, d in zip(primals, tangents, strict=True)))
        return function(*primals), (plus - minus) / (2 * step)


def check_derivative(method: str, step: float) -> None:
    """Raise ConfigError for a method that does not exist, or a step by which times would leave [0, 1] too far."""
    if method not in ("forward", "central"):
        raise ConfigError(f"A derivative's method is 'forward' or 'central', got '{method}'.")
    if not 0 < step <= 0.05:
        raise ConfigError(f"The step of a central difference must lie in (0, 0.05], got {step}.")


def _forward(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor], network: nn.Module | None
) -> tuple[Tensor, Tensor]:
    for primal in primals:
        if primal.ndim == 0:
            raise DerivativeError("Forward mode needs batch-shaped times: got a tensor without dimensions.")
    try:
        with _forward_mode():
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


@contextlib.contextmanager
def _forward_mode() -> Iterator[None]:
    """Choose what has a forward mode, and a right gradient through it, inside the block."""
    with sdpa_kernel(SDPBackend.MATH), _PlainNorms():
        yield


class _PlainNorms(TorchFunctionMode):
    """Work out layer norm and instance norm by their definitions.

    The fused ones take their saved mean and deviation for constants when a gradient goes back through the
    tangent (pytorch/pytorch issue 196700, open): no error, and a gradient that is off by a tenth and more.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.layer_norm:
            func = _layer_norm
        elif func is functional.instance_norm and args[0].ndim > 2:
            func = _instance_norm
        return func(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scale_and_shift(_standardise(x, range(-len(normalized_shape), 0), eps), weight, bias)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None:  # kept as a buffer: right in evaluation, and an error in training, as in batch norm
        return functional.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    per_channel = [None if p is None else p.reshape(-1, *[1] * (x.ndim - 2)) for p in (weight, bias)]
    return _scale_and_shift(_standardise(x, range(2, x.ndim), eps), *per_channel)


def _standardise(x: Tensor, dimensions: Sequence[int], eps: float) -> Tensor:
    centred = x - x.mean(tuple(dimensions), keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(tuple(dimensions), keepdim=True) + eps)


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


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
        with _forward_mode():
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
