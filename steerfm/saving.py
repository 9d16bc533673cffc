"""Flow maps on disk: flow_map.json says how to build the map, flow_map.safetensors holds its weights. No pickle."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steerfm.building import build, describe
from steerfm.conditions.guidance import EVERYWHERE
from steerfm.errors import CheckpointError, ConfigError, TrustError
from steerfm.files import write_atomic

if TYPE_CHECKING:
    from steerfm.flow_map import FlowMap

log = logging.getLogger(__name__)

FORMAT = 1
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace)
SLACK = 2**26  # elements that a map may make beyond its weights
LEAST = 2**12  # elements that any tensor counts for, since each has a module around it
JSON_NAME, WEIGHTS_NAME = "flow_map.json", "flow_map.safetensors"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def describe_flow_map(flow_map: FlowMap) -> dict[str, Any]:
    """Return what rebuilds the map, as JSON-able data; a network that cannot be described is left to the user."""
    description: dict[str, Any] = {"_target_": "steerfm.flow_map.FlowMap"}
    try:
        description["network"] = describe(getattr(flow_map.network, "_orig_mod", flow_map.network))
    except CheckpointError as error:
        log.warning("%s The map is saved all the same: load it with FlowMap.load(path, network=...).", error)
        description["network"] = None
    for name in ("path", "conditioner", "codec", "output", "guidance_scale"):
        description[name] = describe(getattr(flow_map, name))
    if flow_map.guidance_interval != EVERYWHERE:  # an older steerfm loads what it can run
        description["guidance_interval"] = describe(flow_map.guidance_interval)
    return description


def save_flow_map(flow_map: FlowMap, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the map into `folder` and return it. Raises RunError where it cannot be written.

    dtype: the floating type of the file, such as torch.float16; a map is loaded in the type that it had, all the same.
    """
    tensors = {_plain(name): tensor.detach().cpu().contiguous() for name, tensor in flow_map.state_dict().items()}
    described: dict[str, Any] = {"format": FORMAT, "weights": flow_map.weights}
    if dtype is not None and dtype != flow_map.dtype:
        tensors = _in_type(tensors, dtype)
        described["dtype"] = str(flow_map.dtype).removeprefix("torch.")
    text = json.dumps({**described, "flow_map": describe_flow_map(flow_map)}, indent=2)
    write_atomic(folder / WEIGHTS_NAME, serialise(_unshared(tensors)))
    write_atomic(folder / JSON_NAME, text.encode())
    return folder


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile wraps a network in another module


def _in_type(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors with those of a floating type in `dtype`."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a copy of each that shares its memory with an earlier one, as tied weights do."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


def load_flow_map(
    cls: type[FlowMap],
    path: Path,
    *,
    weights: Literal["ema", "raw"] | None = None,
    network: nn.Module | None = None,
    trusted: Sequence[str] = (),
) -> FlowMap:
    """Load a map from its folder, a run folder, or a Lightning checkpoint; see FlowMap.load."""
    if weights not in (None, "ema", "raw"):
        raise ConfigError(f"weights is 'ema', 'raw' or None, got '{weights}'.")
    if path.is_dir():
        folder = path if (path / JSON_NAME).exists() else path / "map"
        description, tensors, taken = _read_folder(folder, path, weights)
    elif path.exists():
        description, tensors, taken = _read_checkpoint(path, weights)
    else:
        raise CheckpointError(f"There is no flow map at {path}: give a saved map's folder, a run, or a .ckpt file.")
    with contextlib.nullcontext() if _names_pretrained(description) else _Bounded(tensors):
        flow_map = _rebuild(cls, description, network, path, trusted)
    _fill(flow_map, tensors, path)
    flow_map.weights = taken
    log.info("Loaded the %s weights of %s", taken, path)
    return flow_map.eval()


def _read_folder(folder: Path, asked: Path, weights: str | None) -> tuple[Any, dict[str, Tensor], str]:
    if not (folder / JSON_NAME).exists():
        raise CheckpointError(f"{asked} holds no flow map: neither {JSON_NAME} nor map/{JSON_NAME} is there.")
    try:
        saved = json.loads((folder / JSON_NAME).read_text())
        description, taken, version = dict(saved["flow_map"]), saved["weights"], int(saved["format"])
        dtype = DTYPES[saved["dtype"]] if "dtype" in saved else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder / JSON_NAME} is damaged ({error!r}): save the map again.") from error
    if version > FORMAT:
        raise CheckpointError(f"{folder / JSON_NAME} was written by a newer steerfm: upgrade steerfm to load it.")
    if weights is not None and weights != taken:
        raise CheckpointError(f"{folder} holds the {taken} weights only: load the run's checkpoint for {weights}.")
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
        return description, tensors if dtype is None else _in_type(tensors, dtype), taken
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}: copy it beside {JSON_NAME}.") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} is damaged ({error}): copy or save it again.") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a Lightning checkpoint as plain data and tensors; nothing in it is executed.

    Raises CheckpointError for a damaged file or one that holds more than data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes the reader raise is anybody's guess
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of steerfm ({reason}): use an earlier one."
        ) from error


def _read_checkpoint(path: Path, weights: str | None) -> tuple[Any, dict[str, Tensor], str]:
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not {"flow_map", "state_dict"} <= set(checkpoint):
        raise CheckpointError(f"{path} holds no flow map: it was not written by FlowMapTraining or RewardFineTuning.")
    try:
        description = dict(checkpoint["flow_map"])
        raw = _without_prefix(checkpoint["state_dict"])
        average = _without_prefix(checkpoint.get("callbacks", {}).get("EMA", {}).get("average") or {})
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an earlier one.") from error
    taken = weights or ("ema" if average else "raw")
    if taken == "ema":
        if not average:
            raise CheckpointError(
                f"{path} holds no EMA weights: train with the EMA callback, or ask for weights='raw'."
            )
        raw |= average
    return description, raw, taken


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the flow map's tensors among those of a module."""
    start = "flow_map."
    return {
        _plain(name.removeprefix(start)): tensor
        for name, tensor in tensors.items()
        if name.startswith(start) and isinstance(tensor, Tensor)
    }


class _Bounded(TorchFunctionMode):
    """Refuse, in its block, to make parameters far larger than the weights that they are to take.

    A description is a few numbers, and one digit too many would fill the memory before the weights are looked at.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.left = SLACK + 4 * sum(tensor.numel() for tensor in tensors.values())

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in MAKERS:
            self.left -= max(func(*args, **{**given, "device": "meta"}).numel(), LEAST)
            if self.left < 0:
                raise CheckpointError("it describes a map that is far larger than its weights")
        return func(*args, **given)


def _names_pretrained(description: Any) -> bool:
    """Say whether a map has parts with files of their own, of any size: of a pipeline, or a frozen text encoder."""
    text = str(description)
    return "steerfm.backbones." in text or "steerfm.conditions.text_embeddings." in text


def _rebuild(
    cls: type[FlowMap], description: Mapping[str, Any], network: nn.Module | None, path: Path, trusted: Sequence[str]
) -> FlowMap:
    if network is not None:
        description = {**description, "network": None}
    elif not description.get("network"):
        raise CheckpointError(f"{path} was saved with a network of your own: FlowMap.load(path, network=MyNet(...)).")
    try:
        parts = {name: build(value, trusted) for name, value in description.items() if name != "_target_"}
        return cls(**{**parts, "network": network if network is not None else parts["network"]})
    except TrustError as error:
        raise TrustError(f"{error} (or, from Python, FlowMap.load(path, network=MyNet(...)))") from error
    except Exception as error:  # whatever a constructor makes of damaged or foreign arguments
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"The flow map in {path} cannot be built from its description ({type(error).__name__}: {detail}): "
            "load it with the version of steerfm that saved it, or save it again."
        ) from error


def _fill(flow_map: FlowMap, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load the weights, in the floating type they were saved in where it is one; LoRA's additions have their own."""
    types = {t.dtype for name, t in tensors.items() if t.is_floating_point() and ".lora_" not in name}
    if len(types) == 1 and not any(name.endswith(".left_out") for name in tensors):  # those are read in their own type
        flow_map.to(types.pop())
    try:
        flow_map.load_state_dict(dict(tensors))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The weights in {path} do not fit the network ({detail}).") from error
