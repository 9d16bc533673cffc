"""Networks around networks: a velocity alone, and a diagonal of its own."""

from __future__ import annotations

import torch
from torch import nn

from steerfm.building import remembered
from steerfm.types import Condition, State, Times


@remembered
class VelocityNetwork(nn.Module):
    """Let a network of the velocity, called as network(x, t, condition), stand where one of u(x, s, t) is asked for.

    It answers with the velocity at s whatever t is, so that a FlowMap around it is right on the diagonal, and its jumps
    are Euler steps: a teacher, or the start of distillation. data_shape: that of the network where it has one.
    """

    velocity_only = True

    def __init__(self, network: nn.Module, data_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.network = network
        self.guidance_input = getattr(network, "guidance_input", False)
        self.data_shape = tuple(network.data_shape if data_shape is None else data_shape)  # type: ignore[arg-type]

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        return self.network(x, s, condition)


@remembered
class ApartDiagonal(nn.Module):
    """Tell the network of u(x, s, t) the times (2 - s, 1) where s = t, so that the velocity is a task of its own.

    The network then meets source times in [1, 2] for the velocity and in [0, 1] for the integral, and the two do not
    pull at each other. Reference: Peng et al. 2025, arXiv 2507.03738 (FACM: the expanded time interval).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.guidance_input = getattr(network, "guidance_input", False)
        self.data_shape = network.data_shape

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        apart = s == t
        return self.network(x, torch.where(apart, 2 - s, s), torch.where(apart, torch.ones_like(t), t), condition)
