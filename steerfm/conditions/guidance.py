"""Classifier-free guidance: its scale as a tensor of a condition, one scale a row, and its interval of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerfm.errors import ConfigError
from steerfm.types import Condition

EVERYWHERE = (0.0, 1.0)  # the interval of source times in which guidance acts, where nothing is said
SCALE = "guidance"


def with_scale(condition: Condition, scale: Tensor | float) -> Condition:
    """Return the condition with a guidance scale a row, (B,) or one number for all; one that it had is replaced.

    A flow map takes it before its own `guidance_scale`, and a network built with `guidance_input=True` reads it.
    """
    scales = scale if isinstance(scale, Tensor) else torch.full((len(condition),), float(scale))
    return Condition({**condition.tensors, SCALE: scales.to(_device(condition))})


def without_scale(condition: Condition) -> Condition:
    """Return the condition without its guidance scales, as its conditioner gave it."""
    if SCALE not in condition.tensors:
        return condition
    return Condition({name: tensor for name, tensor in condition.tensors.items() if name != SCALE})


def null_rows(condition: Condition, null: Condition) -> Tensor:
    """Return which rows are the null condition, (B,) bool; null: one row of it. Scales play no part."""
    same = torch.ones(len(condition), dtype=torch.bool, device=_device(condition))
    for name, nothing in null.tensors.items():
        same = same & (condition[name] == nothing).reshape(len(same), -1).all(1)
    return same


def checked_interval(interval: Sequence[float]) -> tuple[float, float]:
    """Return an interval of source times, (low, high). Raises ConfigError unless 0 <= low < high <= 1."""
    low, high = (float(end) for end in interval) if len(interval) == 2 else (0.0, 0.0)
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"guidance_interval is (low, high) with 0 <= low < high <= 1, source times, got {interval}: t = 1 is noise."
        )
    return low, high


def _device(condition: Condition) -> torch.device:
    return next(iter(condition.tensors.values())).device
