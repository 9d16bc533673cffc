"""What diffusers' pipelines differ in: their parts, how their prompts are read and how their networks are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfm.errors import ConfigError, nearest
from steerfm.images import to_unit
from steerfm.types import Condition, State, Times

Encoded = dict[str, Tensor]
IMAGE = "image_embedding"  # what a condition calls CLIP's embedding of a picture, for an IP-Adapter


@dataclass(frozen=True)
class Family:
    """Hold what one pipeline class needs.

    network: the part that is the map. texts: encoders with their tokenizers; those in `optional` may be left out.
    read: (pipeline, prompt, options) -> the tensors of one prompt, (1, ...). call: (network, x, timestep, condition,
    guidance, size) -> its answer, x alike; timestep as `Conversion.told` gives it, guidance (B,), size in pixels. free:
    whether it was trained for classifier-free guidance. packed: latents are told two by two, so their sizes are even.
    control: the part that reads a picture of the prompt, "caption @ path", if any, whose residuals `call` then takes.
    pictures: whether an IP-Adapter can be put into the network.
    """

    network: str
    texts: Mapping[str, str]
    read: Callable[[Any, str, dict[str, Any]], Encoded]
    call: Callable[..., State]
    optional: tuple[str, ...] = ()
    free: bool = True
    packed: bool = False
    control: str | None = None
    pictures: bool = False

    def guidance_input(self, config: Mapping[str, Any]) -> bool:
        """Whether the network is told its guidance scale, as guidance-distilled ones are."""
        return bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None


def family_of(index: Mapping[str, Any]) -> Family:
    """Return the family of a model_index.json. Raises ConfigError for a pipeline that is not known."""
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"The pipeline {name} is not known{nearest(name, FAMILIES) or '.'} Known: {known}.")
    return FAMILIES[name]


# --- reading prompts: each returns (1, ...) tensors of one prompt ---------------------------------------------


def _read_sd3(pipeline: Any, prompt: str, options: dict[str, Any]) -> Encoded:
    embedding, _, pooled, _ = pipeline.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False, **_length(options)
    )
    return {"embedding": embedding, "pooled": pooled}


def _read_flux(pipeline: Any, prompt: str, options: dict[str, Any]) -> Encoded:
    embedding, pooled, _ = pipeline.encode_prompt(prompt, **_length(options))
    return {"embedding": embedding, "pooled": pooled}


def _read_sana(pipeline: Any, prompt: str, options: dict[str, Any]) -> Encoded:
    """Return the caption's tokens; all but negative prompts follow the instruction that the pipeline asks with."""
    instruction = None if options.get("negative") else _default(pipeline, "complex_human_instruction")
    more = {"complex_human_instruction": instruction, **_length(options)}
    if "do_classifier_free_guidance" in parameters_of(pipeline.encode_prompt):
        more["do_classifier_free_guidance"] = False
    embedding, mask, *_ = pipeline.encode_prompt(prompt, **more)
    return {"embedding": embedding, "embedding_mask": mask}


def _read_sd(pipeline: Any, prompt: str, options: dict[str, Any]) -> Encoded:
    return {"embedding": pipeline.encode_prompt(prompt, pipeline.device, 1, False)[0]}


def _read_sdxl(pipeline: Any, prompt: str, options: dict[str, Any]) -> Encoded:
    embedding, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    if options.get("negative") and options.get("unsaid") and pipeline.config.force_zeros_for_empty_prompt:
        return {"embedding": torch.zeros_like(embedding), "pooled": torch.zeros_like(pooled)}
    return {"embedding": embedding, "pooled": pooled}


def _read_pixart(pipeline: Any, prompt: str, options: dict[str, Any]) -> Encoded:
    cleaned = _default(pipeline, "clean_caption")
    embedding, mask, *_ = pipeline.encode_prompt(prompt, False, clean_caption=cleaned, **_length(options))
    return {"embedding": embedding, "embedding_mask": mask}


# --- calling networks ------------------------------------------------------------------------------------------


def _call_sd3(
    network: Any, x: State, timestep: Times, condition: Condition, guidance: Times, size: tuple[int, int]
) -> State:
    return network(
        hidden_states=x,
        timestep=timestep,
        encoder_hidden_states=condition["embedding"].to(x.dtype),
        pooled_projections=condition["pooled"].to(x.dtype),
        return_dict=False,
    )[0]


def _call_flux(
    network: Any, x: State, timestep: Times, condition: Condition, guidance: Times, size: tuple[int, int]
) -> State:
    """Call FLUX, which takes two by two latents as one token, with their row and column."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    place = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    place[..., 1] = torch.arange(rows, device=x.device)[:, None]
    place[..., 2] = torch.arange(columns, device=x.device)[None, :]
    embedding = condition["embedding"].to(x.dtype)
    answer = network(
        hidden_states=packed(x),
        timestep=timestep / 1000,
        guidance=guidance if network.config.guidance_embeds else None,
        pooled_projections=condition["pooled"].to(x.dtype),
        encoder_hidden_states=embedding,
        txt_ids=torch.zeros(embedding.shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=place.flatten(0, 1),
        return_dict=False,
    )[0]
    return unpacked(answer, rows, columns)


def _call_sana(
    network: Any, x: State, timestep: Times, condition: Condition, guidance: Times, size: tuple[int, int]
) -> State:
    told = network.config.guidance_embeds
    answer = network(
        x,
        encoder_hidden_states=condition["embedding"].to(x.dtype),
        encoder_attention_mask=condition["embedding_mask"],
        timestep=timestep if told else timestep * network.config.timestep_scale,
        guidance=(guidance * network.config.guidance_embeds_scale).to(x.dtype) if told else None,
        return_dict=False,
    )[0]
    return answer[:, : x.shape[1]]  # behind it a variance that some have learnt


def _call_unet(
    network: Any,
    x: State,
    timestep: Times,
    condition: Condition,
    guidance: Times,
    size: tuple[int, int],
    residuals: Mapping[str, Any] | None = None,
) -> State:
    """Call a U-Net, with a ControlNet's residuals where there are some, and a picture where it has an IP-Adapter."""
    width = network.config.time_cond_proj_dim
    return network(
        x,
        timestep,
        encoder_hidden_states=condition["embedding"].to(x.dtype),
        timestep_cond=None if width is None else guidance_waves(guidance, width).to(x.dtype),
        added_cond_kwargs=_added(x, condition, size),
        return_dict=False,
        **(residuals or {}),
    )[0]


def _added(x: State, condition: Condition, size: tuple[int, int]) -> dict[str, Any] | None:
    """Return what Stable Diffusion XL is also told, the pooled text and the pictures' size before and after.

    An IP-Adapter is told a list, of one adapter, of (B, 1, ...), one picture a prompt.
    """
    added: dict[str, Any] = {}
    if "pooled" in condition.tensors:
        numbers = torch.tensor([*size, 0, 0, *size], device=x.device, dtype=x.dtype)
        added |= {"text_embeds": condition["pooled"].to(x.dtype), "time_ids": numbers.expand(len(x), -1)}
    if IMAGE in condition.tensors:
        added["image_embeds"] = [condition[IMAGE].to(x.dtype)[:, None]]
    return added or None


def control_residuals(
    control: Any, x: State, timestep: Times, condition: Condition, size: tuple[int, int]
) -> dict[str, Any]:
    """Return what a ControlNet adds to its U-Net for the rows' pictures; zeros for rows without one.

    Reference: Zhang et al. 2023, arXiv 2302.05543.
    """
    picture = condition["picture"].to(x.dtype)  # (B, 4, H, W): in [-1, 1], and 1 where there is one
    down, middle = control(
        x,
        timestep,
        encoder_hidden_states=condition["embedding"].to(x.dtype),
        controlnet_cond=to_unit(picture[:, :3]),
        added_cond_kwargs=_added(x, condition, size),
        return_dict=False,
    )
    there = picture[:, 3:, :1, :1]
    return {
        "down_block_additional_residuals": [there * each for each in down],
        "mid_block_additional_residual": there * middle,
    }


def _call_pixart(
    network: Any, x: State, timestep: Times, condition: Condition, guidance: Times, size: tuple[int, int]
) -> State:
    """Call PixArt's transformer; that of alpha at 1024 pixels is also told the size and the ratio of the sides."""
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if getattr(network.adaln_single.emb, "use_additional_conditions", False):
        shape = torch.tensor([size], device=x.device, dtype=x.dtype).expand(len(x), -1)
        added = {"resolution": shape, "aspect_ratio": shape[:, :1] / shape[:, 1:]}
    answer = network(
        x,
        encoder_hidden_states=condition["embedding"].to(x.dtype),
        encoder_attention_mask=condition["embedding_mask"],
        timestep=timestep,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return answer[:, : x.shape[1]]


def packed(x: State) -> Tensor:
    """Return latents (B, C, H, W) as FLUX's tokens, (B, H / 2 * W / 2, 4 C)."""
    squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H / 2, 2, W / 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, rows: int, columns: int) -> State:
    """Return FLUX's tokens as latents, the inverse of `packed`."""
    squares = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def guidance_waves(scale: Times, width: int) -> Tensor:
    """Return sines and cosines of 1000 (scale - 1), (B, width), as latent consistency models are told their scale.

    Reference: Luo et al. 2023, arXiv 2310.04378, whose scale counts from 0, no guidance.
    """
    half = width // 2
    rates = torch.arange(half, device=scale.device, dtype=torch.float32) * (-torch.tensor(1e4).log() / (half - 1))
    angles = 1000 * (scale.float() - 1)[:, None] * rates.exp()
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def _length(options: Mapping[str, Any]) -> dict[str, int]:
    """Return the most tokens of a long prompt as the pipelines call them; their own number where nothing is said."""
    return {} if options.get("length") is None else {"max_sequence_length": options["length"]}


def parameters_of(function: Any) -> Mapping[str, Any]:
    """Return the parameters of a function by name."""
    return inspect.signature(function).parameters


def _default(pipeline: Any, name: str) -> Any:
    """Return what a pipeline takes for an argument of its call where nothing is said, None if it has none."""
    parameter = parameters_of(type(pipeline).__call__).get(name)
    return None if parameter is None else parameter.default


def usual_guidance(pipeline_class: Any) -> float:
    """Return the guidance scale that a pipeline's call takes where nothing is said."""
    parameter = parameters_of(pipeline_class.__call__).get("guidance_scale")
    return 1.0 if parameter is None else float(parameter.default)


ONE = {"text_encoder": "tokenizer"}
TWO = ONE | {"text_encoder_2": "tokenizer_2"}
THREE = TWO | {"text_encoder_3": "tokenizer_3"}

FAMILIES = {
    "StableDiffusion3Pipeline": Family("transformer", THREE, _read_sd3, _call_sd3, optional=("text_encoder_3",)),
    "FluxPipeline": Family("transformer", TWO, _read_flux, _call_flux, free=False, packed=True),
    "SanaPipeline": Family("transformer", ONE, _read_sana, _call_sana),
    "SanaSprintPipeline": Family("transformer", ONE, _read_sana, _call_sana, free=False),
    "StableDiffusionPipeline": Family("unet", ONE, _read_sd, _call_unet, pictures=True),
    "StableDiffusionControlNetPipeline": Family("unet", ONE, _read_sd, _call_unet, control="controlnet"),
    "StableDiffusionXLControlNetPipeline": Family("unet", TWO, _read_sdxl, _call_unet, control="controlnet"),
    "LatentConsistencyModelPipeline": Family("unet", ONE, _read_sd, _call_unet, free=False, pictures=True),
    "StableDiffusionXLPipeline": Family("unet", TWO, _read_sdxl, _call_unet, pictures=True),
    "PixArtAlphaPipeline": Family("transformer", ONE, _read_pixart, _call_pixart),
    "PixArtSigmaPipeline": Family("transformer", ONE, _read_pixart, _call_pixart),
}
