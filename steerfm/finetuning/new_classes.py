"""Tell an unconditional map classes, so that fine-tuning can make it follow prompts that it never learnt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from steerfm.building import build, describe
from steerfm.conditions import Labels
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap
from steerfm.networks.sharing import copy_around


@dataclass(frozen=True)
class NewClasses:
    """Return the same map with a class embedding that starts at zero, all of which trains: NewClasses(names)(flow_map).

    An `adapter` of RewardFineTuning. classes: the captions or names, as `Labels` takes them. The network is built anew
    with num_classes and takes the weights, so that at first every prompt draws what the map drew. The reward then
    teaches what each prompt means. Raises ConfigError for a map that has a conditioner, or a network without
    num_classes.
    """

    classes: Sequence[str]

    def __call__(self, flow_map: FlowMap) -> FlowMap:
        if flow_map.conditioner is not None:
            raise ConfigError(
                f"The map reads its prompts by {type(flow_map.conditioner).__name__} already: leave the adapter out."
            )
        old = getattr(flow_map.network, "_orig_mod", flow_map.network)
        if "num_classes" not in inspect.signature(type(old)).parameters:
            raise ConfigError(f"{type(old).__name__} reads no classes: take an MLP, a UNet or a DiT.")
        network = build({**describe(old), "num_classes": len(self.classes)}).to(flow_map.device, flow_map.dtype)
        state: dict[str, Any] = dict(network.state_dict())
        new = state.keys() - old.state_dict().keys()
        network.load_state_dict(old.state_dict(), strict=False)
        for name, parameter in network.named_parameters():
            if name in new:
                nn.init.zeros_(parameter)
        told = copy_around(flow_map)
        told.network, told.conditioner = network, Labels(self.classes)
        return told.train(flow_map.training)
