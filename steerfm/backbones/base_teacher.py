"""The map without its low-rank additions as its own teacher: a second model on the same weights."""

from __future__ import annotations

from torch import nn

from steerfm.backbones.lora import without_lora
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap


class LoRABase(nn.Module):
    """Teach a map with LoRA by what it was before: the `teacher` of an objective, on the same frozen weights.

    guidance: the scale at which the base teaches, so that its guided velocity is learnt (Meng et al. 2022, arXiv
    2210.03142); networks that read a scale are told it, others are called a second time. Raises ConfigError, in
    `begin`, for a map without LoRA.
    """

    def __init__(self, guidance: float = 1.0) -> None:
        super().__init__()
        self.guidance = guidance
        self._held: tuple[FlowMap, ...] = ()  # no part of this module: its weights are the trained map's

    def begin(self, flow_map: FlowMap) -> None:
        """Take the base of the map that is trained."""
        self._held = (without_lora(flow_map).with_guidance(self.guidance).eval(),)

    def follow(self, flow_map: FlowMap, step: int) -> None:
        """Do nothing: the base does not change."""

    @property
    def map(self) -> FlowMap:
        """Return the base. Raises ConfigError before `begin`."""
        if not self._held:
            raise ConfigError(
                "LoRABase holds no map yet: FlowMapTraining calls begin(flow_map), and so does a loop of your own."
            )
        return self._held[0]
