"""LoRA in files of its own, in peft's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from steerfm.backbones.lora import NAME, LoRA, LoRANetwork, lora_of, without_lora
from steerfm.errors import CheckpointError, ConfigError, missing_package
from steerfm.files import cannot_write, write_atomic
from steerfm.flow_map import FlowMap
from steerfm.networks.sharing import copy_around
from steerfm.seeds import noise

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # where peft's models keep the network
# Fields of peft's configuration that leave the additions' values alone, or that are read here.
UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


def save_adapter(flow_map: FlowMap, folder: str | Path) -> Path:
    """Write the additions of a map with LoRA into `folder` and return it; the base is not written.

    `load_adapter` puts them on the base again, and so does peft's PeftModel.from_pretrained(network, folder). They are
    loaded once and compared before this returns: CheckpointError where the outputs differ.
    """
    folder, added = Path(folder), lora_of(flow_map)
    network: Any = added.network
    tensors = {
        f"{PREFIX}{name}.lora_{factor}.weight": getattr(layer, f"lora_{factor}")[NAME].weight.detach().cpu()
        for name, layer in added.layers().items()
        for factor in "AB"
    }
    write_atomic(folder / WEIGHTS_NAME, serialise({name: tensor.contiguous() for name, tensor in tensors.items()}))
    try:
        network.peft_config[NAME].save_pretrained(folder)
    except OSError as error:
        raise cannot_write(folder / CONFIG_NAME, error) from error
    back = load_adapter(without_lora(flow_map), folder)
    if not torch.equal(_output(back), _output(flow_map)):
        raise CheckpointError(f"The additions in {folder} do not give the map's outputs again: save them once more.")
    return folder


def load_adapter(flow_map: FlowMap, folder: str | Path) -> FlowMap:
    """Return the map with the additions in `folder`, written here or by peft for the same network.

    Raises CheckpointError for missing or damaged files, for layers that the network does not have, and for what is
    more than W + (alpha / rank) B A.
    """
    folder = Path(folder)
    if isinstance(flow_map.network, LoRANetwork):
        raise ConfigError("The map has LoRA already: load more on merged(flow_map), or on without_lora(flow_map).")
    config, tensors = _read_config(folder), _read_weights(folder)
    names = list(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in tensors))
    tuned = LoRA(int(config["r"]), float(config["lora_alpha"]), names)(flow_map)
    _fill(lora_of(tuned).layers(), tensors, folder)
    return tuned


def _fill(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    wanted = {
        f"{name}.lora_{factor}.weight": getattr(layer, f"lora_{factor}")[NAME].weight
        for name, layer in layers.items()
        for factor in "AB"
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in wanted.items()}:
        raise CheckpointError(f"The additions in {folder} do not fit the network: load the map they were made for.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def _read_config(folder: Path) -> dict[str, Any]:
    """Return peft's configuration, complete. Raises CheckpointError for more than plain LoRA."""
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise missing_package("peft", "diffusers", "LoRA") from error
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder} holds no LoRA: there is no {CONFIG_NAME}. A whole map loads by FlowMap.load.")
    usual = dataclasses.asdict(LoraConfig())
    try:
        found = {**usual, **json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} is damaged ({error}): copy or save it again.") from error
    more = [key for key in found if key not in UNDERSTOOD and found[key] and found[key] != usual.get(key)]
    if found["peft_type"] != "LORA" or more:
        what = f"LoRA with {', '.join(more)}" if found["peft_type"] == "LORA" else found["peft_type"]
        raise CheckpointError(
            f"{folder} holds {what}, and plain LoRA alone is read here: merge it by peft, and load that."
        )
    return found


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}: copy it beside {CONFIG_NAME}.") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} is damaged ({error}): copy or save it again.") from error
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def _output(flow_map: FlowMap) -> Tensor:
    """Return the network's output at fixed states, without a prompt, in evaluation."""
    view = copy_around(flow_map).eval()
    x = noise([0, 1], view.data_shape, dtype=view.dtype, device=view.device)
    condition = None if view.conditioner is None else view.conditioner.null(2).to(view.device)  # type: ignore[operator]
    return view.average_velocity(x, 0.9, 0.0 if view.partial else 0.2, condition)
