"""LoRA: train low-rank additions to dense and convolution layers, W + (alpha / rank) B A, and none of the weights.

A map with LoRA samples, steers, saves and loads as any flow map does; its file holds base and additions. The functions
here never change the map that they are given: what they return shares its weights, and only `merged` has its own.

Reference: Hu et al. 2021, arXiv 2106.09685. The layers, and the additions' own files (`lora_files`), are peft's.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.backbones.names import matching
from steerfm.building import remembered
from steerfm.errors import ConfigError, missing_package
from steerfm.flow_map import FlowMap, declared
from steerfm.networks.sharing import copy_around
from steerfm.types import Condition, State, Times

NAME = "default"  # peft's own name of an only adapter
UNCALLED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they take their layers' weights without calling them


@dataclass(frozen=True)
class LoRA:
    """Return the same map with low-rank additions, the only parameters that train: LoRA(rank=8)(flow_map).

    An `adapter` of RewardFineTuning. rank: of the additions. alpha: they are scaled by alpha / rank; the rank by
    default. targets: patterns of the names of layers, such as "blocks.*.up"; all linear and convolution layers of the
    network by default. seed: of the first values of A; B starts at zero and the map as what it was. The additions are
    float32 where the weights are of a smaller type. The map that is given stays as it is, except that its weights,
    which both hold, no longer take gradients. A map with additions of just this kind goes on with them. Raises
    ConfigError for a pattern without a layer, or a map with other additions; SteerfmError without peft.
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"The rank of LoRA is 1 or more, got {self.rank}.")

    def __call__(self, flow_map: FlowMap) -> FlowMap:
        tuned, alpha = copy_around(flow_map), float(self.rank if self.alpha is None else self.alpha)
        network = getattr(tuned.network, "_orig_mod", tuned.network)
        if isinstance(network, LoRANetwork):
            network.check_same(self.rank, alpha, self.targets)
        else:
            network = LoRANetwork(network, self.rank, alpha, self.targets, seed=self.seed)
        tuned.network = network
        tuned.requires_grad_(False)
        for parameter in network.additions():
            parameter.requires_grad_(True)
        return tuned


@remembered
class LoRANetwork(nn.Module):
    """Put low-rank additions into a network, in place; see `LoRA` for the arguments."""

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        alpha: float,
        targets: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.targets = rank, alpha, targets
        self.data_shape = network.data_shape
        self.guidance_input = getattr(network, "guidance_input", False)
        self.candidates = tuple(_layers(network))
        self.adapted = self._chosen(targets)
        _inject(network, rank, alpha, self.adapted)
        self.network = network
        self._start(torch.Generator().manual_seed(seed))

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        return self.network(x, s, t, condition)

    def layers(self) -> dict[str, Any]:
        """Return peft's layers by name; `base_layer` is the network's own."""
        return {name: self.network.get_submodule(name) for name in self.adapted}

    def additions(self) -> list[nn.Parameter]:
        """Return the parameters of the additions: A and B of each layer."""
        return [factor[NAME].weight for layer in self.layers().values() for factor in (layer.lora_A, layer.lora_B)]

    def check_same(self, rank: int, alpha: float, targets: str | Sequence[str] | None) -> None:
        """Raise ConfigError if these are not the arguments of the additions that are there."""
        if (rank, alpha, self._chosen(targets)) != (self.rank, self.alpha, self.adapted):
            raise ConfigError(
                f"The map has LoRA of rank {self.rank} and alpha {self.alpha:g} on {len(self.adapted)} layers, and "
                "other LoRA was asked for: write the same to go on with it, or start from "
                "steerfm.backbones.merged(flow_map)."
            )

    def _chosen(self, targets: str | Sequence[str] | None) -> tuple[str, ...]:
        if targets is None:
            return self.candidates
        return tuple(matching(targets, self.candidates, "linear or convolution layer"))

    def _start(self, generator: torch.Generator) -> None:
        """Draw A as linear layers are drawn, from a generator of its own, and let no type be smaller than float32."""
        for layer in self.layers().values():
            weight = layer.lora_A[NAME].weight
            bound = 1 / math.sqrt(weight[0].numel())
            drawn = (2 * torch.rand(weight.shape, generator=generator) - 1) * bound
            with torch.no_grad():
                weight.copy_(drawn)
            for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
                factor.to(torch.promote_types(weight.dtype, torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRANetwork:
        """Move and convert as modules do, except that no addition becomes smaller than float32."""
        own = [(parameter, parameter.data) for parameter in self.additions()]
        super()._apply(fn, recurse)
        for parameter, data in own:
            if parameter.dtype.itemsize < torch.float32.itemsize:
                parameter.data = data.to(parameter.device)
        return self


def merged(flow_map: FlowMap) -> FlowMap:
    """Return a map of the same outputs, up to rounding, whose layers hold weight and addition in one; without peft."""
    added = lora_of(flow_map)
    if declared(added, "quantised"):
        raise ConfigError(
            "A quantised base cannot take its additions in: merge steerfm.backbones.unquantised(flow_map)."
        )
    plain = copy.deepcopy(without_lora(flow_map)).requires_grad_(True)
    with torch.no_grad():
        for name, layer in added.layers().items():
            weight, addition = layer.base_layer.weight, layer.get_delta_weight(NAME)
            plain.network.get_submodule(name).weight.copy_(weight.to(addition) + addition)  # type: ignore[operator]
    return plain


def without_lora(flow_map: FlowMap) -> FlowMap:
    """Return the map without its additions: the base, on the same weights."""
    lora_of(flow_map)
    plain = copy_around(flow_map)
    added = lora_of(plain)
    for name, layer in added.layers().items():
        added.network.set_submodule(name, layer.base_layer)
    del added.network.peft_config
    plain.network = added.network
    return plain


def with_scale(flow_map: FlowMap, scale: float) -> FlowMap:
    """Return the map with `scale` times its additions, on the same parameters: 0 is the base, 1 the tuned map."""
    added, view = lora_of(flow_map), without_lora(flow_map)
    network = LoRANetwork(view.network, added.rank, added.alpha * scale, list(added.adapted))
    for old, new in zip(added.layers().values(), network.layers().values(), strict=True):
        new.lora_A[NAME], new.lora_B[NAME] = old.lora_A[NAME], old.lora_B[NAME]
    view.network = network.train(flow_map.training)
    return view


def lora_of(flow_map: FlowMap) -> LoRANetwork:
    """Return the network of a map with LoRA. Raises ConfigError for a map without."""
    network = getattr(flow_map.network, "_orig_mod", flow_map.network)
    if not isinstance(network, LoRANetwork):
        raise ConfigError(
            f"This map has no LoRA, its network is a {type(network).__name__}: make one with LoRA()(flow_map)."
        )
    return network


def _layers(network: nn.Module) -> list[str]:
    """Return the names of the layers that can take additions."""
    uncalled = [f"{name}." for name, module in network.named_modules() if isinstance(module, UNCALLED)]
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and getattr(module, "groups", 1) == 1  # peft's additions to grouped convolutions cannot be merged
        and not name.startswith(tuple(uncalled))
    ]


def _inject(network: nn.Module, rank: int, alpha: float, names: Sequence[str]) -> None:
    """Replace the layers by peft's around them; the global random numbers are left alone."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise missing_package("peft", "diffusers", "LoRA") from error
    exactly = "|".join(re.escape(name) for name in names)  # a list would match the ends of names
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # its merge is not ours
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly)  # type: ignore[arg-type]
        inject_adapter_in_model(config, network, NAME)
