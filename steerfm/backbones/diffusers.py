"""Pretrained models of diffusers as flow maps: `FlowMap.from_pretrained`.

Four kinds, told apart by the pipeline's own files: rectified flows as velocities, consistency models and one-step
distilled models as partial maps, U-Nets that predict noise or v through `steerfm.backbones.conversions`, and maps that
steerfm saved. A map so loaded samples, steers and is fine-tuned as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from steerfm.backbones.conversions import Kind, grid_of
from steerfm.backbones.families import FAMILIES, Family, family_of, usual_guidance
from steerfm.backbones.ip_adapter import IPAdapter, PromptedPictures
from steerfm.backbones.pipeline_codec import PipelineCodec
from steerfm.backbones.pipeline_files import PipelineFiles, library
from steerfm.backbones.pipeline_network import PipelineNetwork, Quantised, picture_size, vae_scale
from steerfm.backbones.pipeline_prompts import PipelinePrompts
from steerfm.building import build
from steerfm.conditions.pictures import Pictures
from steerfm.errors import ConfigError
from steerfm.flow_map import FlowMap, declared
from steerfm.saving import DTYPES, describe_flow_map

log = logging.getLogger(__name__)


def load_pipeline(
    cls: type[FlowMap],
    files: PipelineFiles,
    *,
    kind: Kind | None = None,
    size: int | Sequence[int] | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    text_length: int | None = None,
    text_device: str | None = None,
    text_files: str | None = None,
    tiling: bool = False,
    slicing: bool = False,
    offload: bool = False,
    checkpointing: bool = False,
    quantised: Quantised | None = None,
    ip_adapter: str | None = None,
    ip_adapter_encoder: str | None = None,
    ip_adapter_scale: float | None = None,
) -> FlowMap:
    """Return a pipeline as a flow map; see `FlowMap.from_pretrained`."""
    files = files.pinned()
    index = files.index()
    family = family_of(index)
    if ip_adapter is None and (ip_adapter_encoder is not None or ip_adapter_scale is not None):
        raise ConfigError("An IP-Adapter's encoder and scale were given without its file: name that, ip_adapter.")
    adapted: dict[str, IPAdapter] = {}  # left out where there is none: an older steerfm loads what it can run
    if ip_adapter is not None:
        _check_pictures(family, index["_class_name"])
        adapted = {"ip_adapter": IPAdapter.named(ip_adapter, ip_adapter_encoder, ip_adapter_scale, files.dtype)}
    texts = [name for name in family.texts if name not in family.optional or files.has(name)]
    control = () if family.control is None else (family.control,)
    files.check(("scheduler", family.network, "vae", *control, *texts, *(family.texts[name] for name in texts)))
    network = PipelineNetwork(files, kind, size, checkpointing, quantised, **adapted)
    if guidance_scale is None:
        guided = network.guidance_input or (family.free and not network.partial)
        guidance_scale = usual_guidance(getattr(library("diffusers"), index["_class_name"])) if guided else 1.0
    prompts = PipelinePrompts(files, negative_prompt, text_length, text_device, text_files)
    conditioner: Pictures | PromptedPictures | PipelinePrompts = prompts
    if control:
        conditioner = Pictures(3, network.size, prompts)
    elif adapted:
        conditioner = PromptedPictures(adapted["ip_adapter"], prompts)
    flow_map = cls(
        network,
        path=network.conversion.path,
        conditioner=conditioner,
        codec=PipelineCodec(files, tiling, slicing, offload),
        guidance_scale=guidance_scale,
    )
    what = "partial map, which knows jumps to data alone" if network.partial else "velocity"
    shape = " x ".join(str(side) for side in network.size)
    log.info("Loaded %s as a %s, with guidance %g, for pictures of %s", files.source, what, guidance_scale, shape)
    return flow_map.eval()


def _check_pictures(family: Family, name: str) -> None:
    """Raise ConfigError for a pipeline without room for an IP-Adapter."""
    if family.control is not None:
        raise ConfigError(
            f"A prompt names one picture, and the ControlNet of a {name} reads it: load the plain pipeline for the "
            "IP-Adapter, or leave ip_adapter out."
        )
    if not family.pictures:
        able = ", ".join(known for known, each in FAMILIES.items() if each.pictures)
        raise ConfigError(f"IP-Adapters are read for {able}, not for a {name}: leave ip_adapter out.")


def opened(
    flow_map: FlowMap,
    source: str,
    others: Sequence[str] = (),
    *,
    guidance_scale: float | None = None,
    text_files: str | None = None,
    checkpointing: bool = False,
    dtype: str = "float32",
) -> FlowMap:
    """Return a map that was saved with these options in place of its own. Raises ConfigError for any others.

    dtype: float32 leaves weights in the type that they have.
    """
    if others:
        raise ConfigError(
            f"{source} is a map that steerfm saved, with its own {', '.join(others)}: leave that out, or begin with "
            "the pipeline."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, got '{dtype}'.")
    if dtype != "float32":
        flow_map.to(DTYPES[dtype])
    if guidance_scale is not None:
        flow_map.guidance_scale = guidance_scale
    if text_files is not None:
        flow_map.conditioner = _keeping(flow_map.conditioner, text_files, source)
    model = declared(flow_map.network, "model")
    if checkpointing and model is not None:
        model.enable_gradient_checkpointing()
    return flow_map


def _keeping(conditioner: Any, text_files: str, source: str) -> Any:
    """Return a conditioner that keeps what prompts were read as; a ControlNet's pictures have one inside."""
    if isinstance(conditioner, PipelinePrompts | PromptedPictures):
        return conditioner.keeping(text_files)
    if isinstance(conditioner, Pictures):
        return Pictures(conditioner.channels, conditioner.size, _keeping(conditioner.captions, text_files, source))
    raise ConfigError(f"{source} reads prompts without a pipeline's encoders, and keeps none: leave text_files out.")


def unquantised(flow_map: FlowMap) -> FlowMap:
    """Return the map on its base in full precision, with the same additions; it is read anew if it was quantised."""
    if not declared(flow_map.network, "quantised"):
        return flow_map
    found = build(_without(describe_flow_map(flow_map), "quantised"))
    found.load_state_dict(flow_map.state_dict())
    return found.to(flow_map.device).train(flow_map.training)


def _without(description: Any, key: str) -> Any:
    """Return a description without an argument, wherever it stands."""
    if isinstance(description, list):
        return [_without(each, key) for each in description]
    if isinstance(description, dict):
        return {name: _without(each, key) for name, each in description.items() if name != key}
    return description


class Encoders(NamedTuple):
    """What leads pictures and prompts into a pretrained model; size: of its pictures, (height, width) in pixels."""

    codec: PipelineCodec
    conditioner: PipelinePrompts
    size: tuple[int, int]


def encoders(
    source: str,
    *,
    text_files: str | None = None,
    size: int | Sequence[int] | None = None,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    variant: str | None = None,
    text_length: int | None = None,
    device: str | None = None,
) -> Encoders:
    """Return a pipeline's autoencoder and text encoders alone, to keep what they make of data; no denoiser is read.

    text_files: where prompts are kept. device: where prompts are read. The others are as in `FlowMap.from_pretrained`.
    """
    files = PipelineFiles(source, revision, variant, str(dtype).removeprefix("torch.")).pinned()
    family = family_of(files.index())
    config, shrink = files.config(family.network), vae_scale(files.config("vae"))
    shape = picture_size(size, SimpleNamespace(**config), shrink, 2 if family.packed else 1)
    conditioner = PipelinePrompts(files, None, text_length, device, text_files)
    return Encoders(PipelineCodec(files), conditioner, shape)


def scheduler_times(flow_map: FlowMap, steps: int, **options: Any) -> list[float]:
    """Return the times, falling from noise to 0, at which a pretrained map's own pipeline takes so many steps.

    options: of the scheduler's set_timesteps, such as original_inference_steps. As `steps` of `Unsteered` they give
    what the pipeline gives. Raises ConfigError for a map that is no pipeline's.
    """
    scheduler, conversion = declared(flow_map.network, "scheduler"), declared(flow_map.network, "conversion")
    if scheduler is None or conversion is None:
        raise ConfigError("Only maps of FlowMap.from_pretrained have a scheduler: give the times yourself.")
    return grid_of(scheduler, conversion, steps, **{**_shifted(flow_map, scheduler, steps), **options})


def equal_sigmas(steps: int) -> list[float]:
    """Return the sigmas that a rectified flow's pipeline is told for equal steps, which its scheduler then shifts."""
    return [1 - i / steps for i in range(steps)]


def _shifted(flow_map: FlowMap, scheduler: Any, steps: int) -> dict[str, Any]:
    """Return what pipelines tell a flow's scheduler besides the number of steps."""
    config, shape = scheduler.config, flow_map.data_shape
    family = declared(flow_map.network, "family")
    options: dict[str, Any] = {}
    if family.packed:  # FLUX's sigmas fall in equal steps from 1, and are then shifted
        options["sigmas"] = equal_sigmas(steps)
    if config.get("use_dynamic_shifting"):
        patch = 2 if family.packed else int(declared(flow_map.network, "model").config.patch_size)
        tokens = (shape[1] // patch) * (shape[2] // patch)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        options["mu"] = low + (high - low) * (tokens - few) / (many - few)  # a line in the number of tokens
    return options


def is_saved_map(source: str) -> bool:
    """Whether a folder, a run or a checkpoint holds a map that steerfm saved."""
    path = Path(source)
    return path.suffix == ".ckpt" or any((path / name / "flow_map.json").is_file() for name in (".", "map"))
