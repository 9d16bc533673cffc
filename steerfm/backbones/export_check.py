"""Whether plain diffusers, given what was exported, paints what the map paints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm.backbones.diffusers import equal_sigmas
from steerfm.backbones.export import LORA_NAME, jump_times
from steerfm.backbones.families import IMAGE, family_of, packed
from steerfm.backbones.pipeline_files import PipelineFiles, library
from steerfm.errors import CheckpointError
from steerfm.flow_map import FlowMap, declared
from steerfm.sampling import few_jumps
from steerfm.seeds import noise

PROMPTS = ("a red fox in snow", "")
CLOSE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}  # of a pixel in [0, 1], by the weights' type


@torch.no_grad()
def painting_gap(flow_map: FlowMap, folder: str | Path, files: PipelineFiles, jumps: int | None = None) -> float:
    """Return the largest difference of a pixel between the map's pictures and those of diffusers' own pipeline.

    files: of the pipeline that the map began as. What `export_diffusers` wrote into `folder` is loaded into it: LoRA by
    load_lora_weights, a whole denoiser in the place of its own; and an IP-Adapter from where the map has it. Both paint
    two prompts from the same noise, without guidance: in so many jumps as the denoiser was bound to, or else in one
    step. Raises CheckpointError where the difference is more than rounding.
    """
    family: Any = declared(flow_map.network, "family")
    model: Any = declared(flow_map.network, "model")
    view = flow_map.eval()
    x1 = noise(range(len(PROMPTS)), view.data_shape, dtype=torch.float32, device=view.device)
    times = [1.0, 0.0] if jumps is None else jump_times(view, jumps)
    ours = view.decode(few_jumps(view.with_guidance(1.0), x1, times, view.encode_prompts(list(PROMPTS))))
    pipeline = library("diffusers").DiffusionPipeline.from_pretrained(
        files.source, revision=files.revision, variant=files.variant, use_safetensors=True, torch_dtype=model.dtype,
        **dict.fromkeys(parts_left_out(files)),
    )  # fmt: skip
    if (Path(folder) / LORA_NAME).is_file():
        pipeline.load_lora_weights(str(folder), weight_name=LORA_NAME)
    else:
        kind = type(getattr(pipeline, family.network))
        own = kind.from_pretrained(folder, subfolder=family.network, torch_dtype=model.dtype, use_safetensors=True)
        pipeline.register_modules(**{family.network: own})
    adapter = declared(flow_map.network, "ip_adapter")
    if adapter is not None:
        adapter.load_into(pipeline)
    theirs = painted(pipeline.to(view.device), view, x1, jumps)
    gap, most = float((theirs - ours).abs().max()), CLOSE[model.dtype]
    if not gap <= most:
        raise CheckpointError(
            f"With what was exported to {folder} diffusers paints otherwise than the map: a pixel is off by {gap:.3g}, "
            f"and rounding explains {most:g}. Keep the map as steerfm saved it, and report this."
        )
    return gap


def parts_left_out(files: PipelineFiles) -> list[str]:
    """Return the parts that a pipeline was saved without, which diffusers wants to be told of."""
    family = family_of(files.index())
    return [part for name in family.optional for part in (name, family.texts[name]) if not files.has(part)]


def painted(pipeline: Any, flow_map: FlowMap, x1: Tensor, jumps: int | None = None) -> Tensor:
    """Return what a pipeline paints of `PROMPTS` from noise (B, *dim) without guidance, in [0, 1].

    jumps: with sigmas in equal steps; None is one step of the pipeline's own.
    """
    family: Any = declared(flow_map.network, "family")
    name = type(pipeline).__name__
    more: dict[str, Any] = {"use_resolution_binning": False} if name.startswith(("Sana", "PixArt")) else {}
    if name == "SanaSprintPipeline":
        more["intermediate_timesteps"] = None
    length = getattr(flow_map.conditioner, "length", None)
    if length is not None:
        more["max_sequence_length"] = length
    height, width = declared(flow_map.network, "size")
    if family.control is not None:  # the prompts name no picture
        more |= {"image": torch.zeros(len(PROMPTS), 3, height, width), "controlnet_conditioning_scale": 0.0}
    none: Any = flow_map.conditioner.null(len(PROMPTS))  # type: ignore[misc,operator]
    if IMAGE in none.tensors:
        more["ip_adapter_image_embeds"] = [none[IMAGE][:, None].to(x1.device, pipeline.dtype)]
    more |= {"num_inference_steps": 1} if jumps is None else {"sigmas": equal_sigmas(jumps)}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(PROMPTS), latents=packed(x1) if family.packed else x1, guidance_scale=1.0, output_type="pt",
        height=height, width=width, **more,
    ).images.float()  # fmt: skip
