"""A pretrained velocity model told a second time: the start of a flow map that any objective can teach to jump.

A diffusion or flow model answers v(x, s). What it lacks for u(x, s, t) is the target time t. Here the interval s - t
becomes sines and cosines, two layers, and is added to the model's own embedding of s, whence it reaches every block as
the time does. The last layer starts at zero: at first u(x, s, t) = v(x, s), every jump is an Euler step, and nothing
that the model knows is lost. Training then moves what LoRA, or all weights, can move.

Geng et al. 2025, arXiv 2505.13447 (MeanFlow), tell a network the interval in place of the target time; Sabour et al.
2025, arXiv 2506.14603 (AYF), distil pretrained text-to-image models into flow maps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.building import remembered
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, declared
from steerfm.networks.embeddings import start_at_zero
from steerfm.networks.sharing import copy_around
from steerfm.types import Condition, State, Times

SAME = 1e-6  # relative error of what a map bound to its jumps adds
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


@torch.no_grad()
def at_jumps(flow_map: FlowMap, times: Sequence[float]) -> FlowMap:
    """Return a map that makes the same jumps between these times, and knows one time alone: for plain diffusers.

    times: falling, such as 1, 0.75, 0.5, 0.25, 0. Between them the interval follows from the source time, so what is
    added for it can be had from the embedding of the source time: the least change of that embedding's last layer
    which adds at each of these times what the interval's embedding would. Elsewhere the result means nothing. Raises
    ConfigError for a map without a second time, or for more times than the layer can tell apart.
    """
    made = copy.deepcopy(flow_map)
    network = made.network
    if not isinstance(network, TwoTimeNetwork):
        raise ConfigError("Only a map of two_times is bound to its jumps; merge its LoRA first.")
    last, seen = _embedder(network.network).linear_2, []
    network.tie.remove()
    s, t = (torch.tensor(each, dtype=torch.float32, device=made.device) for each in (times[:-1], times[1:]))
    hook = last.register_forward_pre_hook(lambda module, given: seen.append(given[0].double()))
    condition = made.conditioner.null(len(s)).to(made.device)  # type: ignore[misc,operator]
    network.network(torch.zeros(len(s), *made.data_shape, device=made.device), s, s, condition)
    hook.remove()
    known, wanted = seen[0], network.added(s, t).double()
    change = torch.linalg.pinv(known) @ wanted  # (in, out): the least one with known @ change = wanted
    if (known @ change - wanted).abs().max() > SAME * wanted.abs().max():
        raise ConfigError(
            f"{len(s)} jumps are more than {type(flow_map.network).__name__} can be bound to: take fewer."
        )
    last.weight += change.T.to(last.weight)
    made.network = network.network
    return made.eval()


def adapted(
    flow_map: FlowMap, second_time: bool = False, adapter: Callable[[FlowMap], FlowMap] | None = None
) -> FlowMap:
    """Return a map with a second time where one is wanted, and then `adapter` of it: what recipes train."""
    told = two_times(flow_map) if second_time else flow_map
    return told if adapter is None else adapter(told)


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
        self.tie = embedder.register_forward_hook(self._told)

    def added(self, s: Times, t: Times) -> Tensor:
        """Return what is added to the embedding of s for the interval to t, (B, width)."""
        angles = (s - t).float()[:, None] * self.rates
        waves = torch.cat([angles.cos() - 1, angles.sin()], 1)  # nothing for an interval of no length
        return self.interval(waves.to(next(self.interval.parameters())))

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        self._embedding = self.added(s, t)
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
