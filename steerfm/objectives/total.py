"""Several objectives at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.types import Condition, State, Times, Values


@dataclass(frozen=True)
class Total:
    """Add objectives on the same rows, each times its weight; a weight of 1 each by default."""

    objectives: Sequence[Callable[..., Values]]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.objectives or (self.weights is not None and len(self.weights) != len(self.objectives)):
            raise ConfigError(
                f"A total needs objectives and one weight for each, got {len(self.objectives)} objectives and "
                f"{0 if self.weights is None else len(self.weights)} weights."
            )

    def __call__(
        self,
        flow_map: FlowMap,
        x0: State,
        x1: State,
        s: Times,
        t: Times,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Values:
        weights = self.weights or [1.0] * len(self.objectives)
        losses = [objective(flow_map, x0, x1, s, t, condition, generator, step) for objective in self.objectives]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum(0)
