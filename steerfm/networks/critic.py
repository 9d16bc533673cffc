"""A critic: any of our networks, made to judge samples."""

from __future__ import annotations

from torch import nn

from steerfm.types import Condition, State, Times, Values


class Critic(nn.Module):
    """Let a network of u(x, s, t) judge x at noise level t: its logit is the mean of what it returns; (B,).

    network: called as network(x, t, t, condition); one that starts at zero starts undecided.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: State, t: Times, condition: Condition | None = None) -> Values:
        return self.network(x, t, t, condition).flatten(1).mean(1)
