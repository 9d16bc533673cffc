"""A tuned pretrained map in diffusers' own files, which plain diffusers loads without steerfm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from steerfm.backbones.diffusers import equal_sigmas, scheduler_times
from steerfm.backbones.lora import NAME, LoRANetwork, lora_of, merged, without_lora
from steerfm.backbones.pipeline_network import PipelineNetwork
from steerfm.backbones.two_times import at_jumps
from steerfm.errors import CheckpointError, ConfigError
from steerfm.files import cannot_write, write_atomic
from steerfm.flow_map import FlowMap, declared
from steerfm.networks.sharing import copy_around
from steerfm.seeds import noise

LORA_NAME = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for in a folder
INSIDE = "model."  # where a PipelineNetwork keeps diffusers' network
CLOSE = 1e-3  # of the largest output: the additions' scale is multiplied in, which rounds


def export_diffusers(flow_map: FlowMap, folder: str | Path, jumps: int | None = None) -> Path:
    """Write a pretrained map's denoiser as diffusers publishes it into `folder`, and return the folder.

    With LoRA, pytorch_lora_weights.safetensors, for `pipeline.load_lora_weights(folder)`: the additions alone, with
    alpha / rank multiplied into B. They are loaded once by diffusers, and compared, before this returns. Without,
    transformer/ or unet/ as a whole, for `from_pretrained(folder, subfolder=...)`; `steerfm.backbones.merged` makes the
    one of the other. A map of two_times, whose second time diffusers does not know, is bound to so many `jumps`
    (`at_jumps`, with its LoRA merged): pipeline(prompt, sigmas=[1, 0.75, 0.5, 0.25]) makes them. The rest of the
    pipeline is not written. Raises ConfigError for a map that is no pipeline's, CheckpointError where what was written
    is not the map.
    """
    folder, family = Path(folder), declared(flow_map.network, "family")
    if family is None:
        raise ConfigError(
            "Only maps of FlowMap.from_pretrained have a form in diffusers: write others by save(folder)."
        )
    network: Any = getattr(flow_map.network, "_orig_mod", flow_map.network)
    if (declared(network, "interval") is not None) != (jumps is not None):
        raise ConfigError(
            "diffusers tells its networks one time and this map is told two: say in how many jumps it shall sample, "
            "--jumps 4 or jumps=4, or write it by save(folder)."
            if jumps is None
            else "This map is told one time, which diffusers tells it too: leave jumps out."
        )
    if jumps is not None:
        plain = merged(flow_map) if isinstance(network, LoRANetwork) else flow_map
        network = at_jumps(plain, jump_times(plain, jumps)).network
    if not isinstance(network, LoRANetwork):
        try:
            network.model.save_pretrained(folder / family.network, safe_serialization=True)
        except OSError as error:
            raise cannot_write(folder / family.network, error) from error
        return folder
    model = declared(network, "model")
    if not hasattr(model, "load_lora_adapter"):
        raise ConfigError(
            f"diffusers loads no LoRA into a {type(model).__name__}: export steerfm.backbones.merged(flow_map), or "
            "--merged on the command line."
        )
    tensors = _additions(network)
    _check(flow_map, tensors)
    named = {f"{family.network}.{name}": tensor for name, tensor in tensors.items()}
    write_atomic(folder / LORA_NAME, serialise(named, {"format": "pt"}))
    return folder


def jump_times(flow_map: FlowMap, jumps: int) -> list[float]:
    """Return the times between which a rectified flow's pipeline jumps when it is told `equal_sigmas`.

    Raises ConfigError for other pipelines, whose schedulers take no sigmas.
    """
    family: Any = declared(flow_map.network, "family")
    scheduler: Any = declared(flow_map.network, "scheduler")
    if jumps < 1 or not type(scheduler).__name__.startswith("FlowMatch"):
        raise ConfigError(
            f"Jumps, 1 or more, are told to the pipelines of rectified flows, got {jumps} for a {family.network} with "
            f"{type(scheduler).__name__}: write this map by save(folder)."
        )
    return scheduler_times(flow_map, jumps, sigmas=equal_sigmas(jumps))


def _additions(network: LoRANetwork) -> dict[str, Tensor]:
    """Return A and B of each layer by diffusers' names, scaled so that the addition is B A."""
    tensors: dict[str, Tensor] = {}
    for name, layer in network.layers().items():
        a, b = (factor[NAME].weight.detach().cpu() for factor in (layer.lora_A, layer.lora_B))
        tensors[f"{name.removeprefix(INSIDE)}.lora_A.weight"] = a.contiguous().clone()
        tensors[f"{name.removeprefix(INSIDE)}.lora_B.weight"] = (b * (network.alpha / network.rank)).contiguous()
    return tensors


def _check(flow_map: FlowMap, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless diffusers makes the map of its base and these additions."""
    lora_of(flow_map)
    plain = without_lora(flow_map)
    network: Any = getattr(plain.network, "_orig_mod", plain.network)
    assert isinstance(network, PipelineNetwork)
    with torch.random.fork_rng(devices=[]):
        network.model.load_lora_adapter(dict(tensors), prefix=None)
    ours, theirs = _answer(flow_map), _answer(plain)
    if not (ours - theirs).abs().max() <= CLOSE * ours.abs().max():
        raise CheckpointError(
            "diffusers does not make the map's outputs of its additions: merge them, and export that."
        )


@torch.no_grad()
def _answer(flow_map: FlowMap) -> Tensor:
    """Return the average velocity to data at fixed states, in evaluation."""
    view = copy_around(flow_map).eval()
    x = noise([0], view.data_shape, dtype=view.dtype, device=view.device)
    condition = view.conditioner.null(1).to(view.device)  # type: ignore[misc,operator]
    return view.average_velocity(x, 0.7, 0.0, condition)
