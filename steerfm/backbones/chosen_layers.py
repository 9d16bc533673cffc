"""Train some of a map's layers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steerfm.backbones.names import matching
from steerfm.flow_map import FlowMap


@dataclass(frozen=True)
class ChosenLayers:
    """Let those parameters of the network train whose names match, such as "blocks.3.*" or "*.bias"; no other does.

    An `adapter` of RewardFineTuning, or ChosenLayers(patterns)(flow_map), which returns the map that it was given.
    Raises ConfigError for a pattern that matches nothing.
    """

    patterns: str | Sequence[str]

    def __call__(self, flow_map: FlowMap) -> FlowMap:
        network = getattr(flow_map.network, "_orig_mod", flow_map.network)
        parameters = dict(network.named_parameters())
        chosen = matching(self.patterns, list(parameters), "parameter")
        flow_map.requires_grad_(False)
        for name in chosen:
            parameters[name].requires_grad_(True)
        return flow_map
