"""What travels between the parts of steerfm: conditions, costs, samples, and names for tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerfm.errors import ConfigError

State: TypeAlias = Float[Tensor, "batch *dim"]  # a point of a path, in model space
Times: TypeAlias = Float[Tensor, " batch"]  # one time a sample, in [0, 1]; t = 0 is data, t = 1 is noise
Values: TypeAlias = Float[Tensor, " batch"]  # one number a sample: a loss, a reward, a log-weight
Images: TypeAlias = Float[Tensor, "batch channel height width"]  # in [0, 1]
Indices: TypeAlias = Int[Tensor, " batch"]


@dataclass(frozen=True)
class Condition:
    """Hold what a network is told besides the state: named tensors that share their first (batch) dimension."""

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ConfigError(f"A condition needs tensors of one batch size, got {sizes}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, index: Tensor | slice) -> Condition:
        """Return the rows that `index` picks."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        """Return the condition on `device`."""
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def repeat_interleave(self, repeats: int) -> Condition:
        """Return every row `repeats` times, copies of one row next to each other."""
        return Condition({name: tensor.repeat_interleave(repeats, 0) for name, tensor in self.tensors.items()})

    def where(self, keep: Tensor, other: Condition) -> Condition:
        """Return this condition's rows where `keep` (B,) is true and those of `other` elsewhere."""
        return Condition({name: torch.where(_column(keep, t), t, other[name]) for name, t in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Return the rows of all `conditions`, in order."""
        return Condition({name: torch.cat([c[name] for c in conditions]) for name in conditions[0].tensors})


@dataclass(frozen=True)
class Cost:
    """Hold what one returned sample cost.

    `network_calls` counts network forward passes (a backward pass counts two), `reward_calls` and
    `reward_gradients` count scored and back-propagated pictures, `seconds` is wall time; all are per
    returned sample, so that methods with different populations compare.
    """

    network_calls: float = 0.0
    reward_calls: float = 0.0
    reward_gradients: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.network_calls + other.network_calls,
            self.reward_calls + other.reward_calls,
            self.reward_gradients + other.reward_gradients,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Samples:
    """Hold what a sampler or steering method returns for B (prompt, seed) pairs.

    x0: (B, *dim) in model space. images: (B, C, H, W) in [0, 1], or (B, d) for points. rewards: (B,), with
    `parts` the unweighted values by name and `held_out` those of rewards that nothing optimised.
    rewards_unclamped: (B,), of the pictures before clamping to [0, 1], where any pixel was clamped. For
    populations of P particles: log_weights (B, P), normalised; effective_sample_size (B,), in particles;
    particles (B, P, *dim); log_evidence (B,), an estimate of log E exp(r / temperature). `trace` holds one tensor a
    step by name, (B, steps, ...). `note` says what the reader must know of the result, such as a temperature that is
    nominal.
    """

    x0: Tensor
    images: Tensor
    prompts: list[str]
    seeds: list[int]
    cost: Cost
    rewards: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    held_out: dict[str, Tensor] = field(default_factory=dict)
    rewards_unclamped: Tensor | None = None
    log_weights: Tensor | None = None
    effective_sample_size: Tensor | None = None
    particles: Tensor | None = None
    log_evidence: Tensor | None = None
    trace: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return len(self.x0)

    def to(self, device: torch.device | str) -> Samples:
        """Return the samples with every tensor on `device`; Trainer.predict brings them to the CPU by it."""
        return Samples(**{each.name: _moved(getattr(self, each.name), device) for each in fields(self)})


def unsqueeze_like(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` (B,) with trailing dimensions of size one, so that it multiplies `like` (B, *dim)."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {name: tensor.to(device) for name, tensor in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _column(keep: Tensor, like: Tensor) -> Tensor:
    return unsqueeze_like(keep.to(like.device), like)
