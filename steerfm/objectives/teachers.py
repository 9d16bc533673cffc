"""Who a map learns from besides itself: frozen maps, averages and earlier states of its own; what an objective holds.

An objective is a frozen dataclass. A flow map in its field `teacher` is a frozen guest of the training: moved to the
device, neither trained nor saved. Any other module in its fields (an average, a discriminator) is a companion: saved
with the run, its parameters trained beside the map's where they take gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap


@runtime_checkable
class Following(Protocol):
    """A companion that follows the map's weights."""

    def begin(self, flow_map: FlowMap) -> None:
        """Copy the map, before training."""
        ...

    def follow(self, flow_map: FlowMap, step: int) -> None:
        """Look at the map's weights after `step` optimiser steps."""
        ...


class _Copy(nn.Module):
    """Hold a copy of the map that is being trained."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: FlowMap | None = None

    def begin(self, flow_map: FlowMap) -> None:
        """Copy the map, before training."""
        self.copied = flow_map.with_guidance(1.0).frozen_copy()  # guidance is for sampling

    @property
    def map(self) -> FlowMap:
        """Return the copy. Raises ConfigError before `begin`."""
        if self.copied is None:
            raise ConfigError(
                f"{type(self).__name__} holds no map yet: FlowMapTraining calls begin(flow_map), and so does a loop of "
                "your own."
            )
        return self.copied


class SelfAverage(_Copy):
    """An exponential moving average of the map's own weights, as a teacher; `decay` in [0, 1) a step."""

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must lie in [0, 1), got {decay}.")
        self.decay = decay

    @torch.no_grad()
    def follow(self, flow_map: FlowMap, step: int) -> None:
        """Move the average toward the map's weights."""
        for average, weight in zip(self.map.parameters(), flow_map.parameters(), strict=True):
            average.lerp_(weight.to(average), 1 - self.decay)


class Rounds(_Copy):
    """The map as it was when the present round began: progressive distillation's teacher.

    start: steps before the first round. every: steps a round takes.
    Reference: Salimans and Ho 2022, arXiv 2202.00512, algorithm 2.
    """

    def __init__(self, start: int, every: int) -> None:
        super().__init__()
        if start < 0 or every < 1:
            raise ConfigError(f"Rounds need a start of 0 or more and at least 1 step each, got {start} and {every}.")
        self.start, self.every = start, every

    @torch.no_grad()
    def follow(self, flow_map: FlowMap, step: int) -> None:
        """Copy the map's weights where a round begins."""
        if step >= self.start and (step - self.start) % self.every == 0:
            for old, new in zip(self.map.parameters(), flow_map.parameters(), strict=True):
                old.copy_(new)


@runtime_checkable
class Holder(Protocol):
    """What holds a map that teaches, as `SelfAverage`, `Rounds` and `steerfm.backbones.LoRABase` do."""

    @property
    def map(self) -> FlowMap:
        """The map."""
        ...


Teacher: TypeAlias = FlowMap | Holder


def teaching(teacher: Teacher | None, flow_map: FlowMap) -> FlowMap:
    """Return the map that teaches: the teacher's, or the map itself where there is none."""
    if teacher is None:
        return flow_map
    return teacher if isinstance(teacher, FlowMap) else teacher.map


@contextlib.contextmanager
def held(*modules: nn.Module) -> Iterator[None]:
    """Let no gradient reach these modules' parameters inside the block; it still passes through to their inputs."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@dataclasses.dataclass
class Parts:
    """The modules in an objective: frozen teachers, and companions by the path of their field.

    leaves_out: whether in some steps a part gives the map no gradient.
    """

    teachers: list[FlowMap]
    companions: dict[str, nn.Module]
    leaves_out: bool = False


def parts_of(objectives: Mapping[str, Any]) -> Parts:
    """Return the modules that the fields of named objectives hold, those of the objectives inside them too."""
    parts = Parts([], {})
    for name, objective in objectives.items():
        _collect(objective, name, parts)
    return parts


def _collect(value: Any, name: str, parts: Parts) -> None:
    if isinstance(value, FlowMap) and name.split("_")[-1] == "teacher":
        parts.teachers.append(value)
    elif isinstance(value, nn.Module):
        parts.companions[name] = value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, item in enumerate(value):
            _collect(item, f"{name}_{i}", parts)
    elif dataclasses.is_dataclass(value):
        parts.leaves_out |= getattr(value, "leaves_out", False)
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name), f"{name}_{field.name}", parts)
