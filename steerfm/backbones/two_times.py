"""A pretrained velocity model told a second time: the start of a flow map that any objective can teach to jump.

A diffusion or flow model answers v(x, s). What it lacks for u(x, s, t) is the target time t. Here the interval s - t
becomes sines and cosines, two layers, and is added to the model's own embedding of s, whence it reaches every block as
the time does. The last layer starts at zero: at first u(x, s, t) = v(x, s), every jump is an Euler step, and nothing
that the model knows is lost. Training then moves what LoRA, or all weights, can move.

Geng et al. 2025, arXiv 2505.13447 (MeanFlow), tell a network the interval in place of the target time; Sabour et al.
2025, arXiv 2506.14603 (AYF), distil pretrained text-to-image models into flow maps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.building import remembered
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, declared
from steerfm.networks.embeddings import start_at_zero
from steerfm.networks.sharing import copy_around
from steerfm.types import Condition, State, Times

EMBEDDERS = ("timestep_embedder", "time_embedding")  # what transformers and U-Nets of diffusers call theirs


def two_times(flow_map: FlowMap, frequencies: int = 16) -> FlowMap:
    """Return the map of a pretrained velocity model with a second time, on the same weights; at first it jumps alike.

    Put LoRA around the result, not inside: LoRA(16)(two_times(flow_map)). Raises ConfigError for a partial map, which
    was distilled to jump to data alone, and for a network whose embedding of time is not found.
    """
    if flow_map.partial:
        raise ConfigError(
            "This map knows jumps to data alone and cannot learn others from itself: load it with kind='velocity', "
            "or begin with the model that it was distilled from."
        )
    if not declared(flow_map.network, "velocity_only", False):
        raise ConfigError("This map has two times already: train it as it is.")
    told = copy_around(flow_map)
    told.network = TwoTimeNetwork(told.network, frequencies)
    return told.to(flow_map.device)


@remembered
class TwoTimeNetwork(nn.Module):
    """Add an embedding of the interval s - t to a pretrained network's embedding of the source time s.

    network: of `FlowMap.from_pretrained`, of kind "velocity". frequencies: log-spaced rates of the sines and cosines,
    from 0.5 to 32 radians a unit of time; a tangent in t is multiplied by them. The two layers are float32 whatever the
    type of the network's weights; their first values do not depend on the global random numbers.
    """

    velocity_only = False
    partial = False
    state_dtype = torch.float32

    def __init__(self, network: nn.Module, frequencies: int = 16) -> None:
        super().__init__()
        self.guidance_input = getattr(network, "guidance_input", False)
        self.data_shape = network.data_shape
        self.network = network
        embedder = _embedder(network)
        width = int(embedder.linear_2.out_features)
        self.rates: Tensor
        self.register_buffer("rates", torch.logspace(math.log10(0.5), math.log10(32), frequencies), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.interval = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        start_at_zero(self.interval[2])
        self._embedding: Tensor | None = None
        embedder.register_forward_hook(self._told)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        angles = (s - t).float()[:, None] * self.rates
        waves = torch.cat([angles.cos() - 1, angles.sin()], 1)  # nothing for an interval of no length
        self._embedding = self.interval(waves.to(next(self.interval.parameters())))
        try:
            return self.network(x, s, t, condition)
        finally:
            self._embedding = None

    def _told(self, module: nn.Module, given: Any, embedding: Tensor) -> Tensor:
        """Return the network's embedding of s with that of the interval, inside a call of this network."""
        return embedding if self._embedding is None else embedding + self._embedding.to(embedding.dtype)


def _embedder(network: nn.Module) -> Any:
    """Return the layers that embed the time. Raises ConfigError unless there is one such module."""
    found = {
        name: module
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in EMBEDDERS and hasattr(module, "linear_2")
    }
    if len(found) != 1:
        seen = ", ".join(found) or "none"
        raise ConfigError(
            f"A second time is added to a pretrained network's one embedding of time, and {type(network).__name__} has "
            f"{seen}: give it a network that takes both times."
        )
    return next(iter(found.values()))
