"""Small pipelines of the real diffusers classes with random weights, written as `save_pretrained` publishes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from steerfm.flow_map import FlowMap

diffusers: Any = importlib.import_module("diffusers")  # its lazy names are unknown to type checkers

WORDS = ("a", "red", "blue", "circle", "square", "left", "of", "the", "blurred")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 24  # tokens that the CLIP encoders read
LATENTS = 8  # the side of the latents; pictures are twice as large


def clip_tokenizer() -> Any:
    """Return a CLIP tokenizer of single letters."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def clip_encoder(projected: bool, seed: int = 0) -> Any:
    """Return CLIP's text encoder with two layers; embeddings have dimension 16."""
    count = 2 * len(LETTERS) + 2
    config = transformers.CLIPTextConfig(
        vocab_size=count, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=16, bos_token_id=count - 2, eos_token_id=count - 1,
        pad_token_id=count - 1,
    )  # fmt: skip
    torch.manual_seed(seed)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return lively(kind(config))


def t5_tokenizer() -> Any:
    """Return a T5 tokenizer of whole words."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return transformers.T5Tokenizer(vocab=words, extra_ids=0, model_max_length=16)


def t5_encoder(width: int = 32) -> Any:
    config = transformers.T5Config(
        vocab_size=len(WORDS) + 3, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )  # fmt: skip
    torch.manual_seed(1)
    return lively(transformers.T5EncoderModel(config))


def gemma_tokenizer() -> Any:
    """Return a Gemma tokenizer of single letters."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def gemma_encoder() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(LETTERS) + 6, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(2)
    return lively(transformers.Gemma2Model(config))


def vae(channels: int = 4, **more: Any) -> Any:
    """Return an autoencoder that halves sides."""
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=4, sample_size=2 * LATENTS, **more,
    )  # fmt: skip


def unet(seed: int = 4, **more: Any) -> Any:
    options: dict[str, Any] = {
        "sample_size": LATENTS, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
        "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    return lively(diffusers.UNet2DConditionModel(**(options | more)))


def lively(model: nn.Module) -> Any:
    """Widen random weights, so that outputs differ with prompts and times."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


def sd3(third: bool = True, newer: bool = False, **scheduler: Any) -> Any:
    """Return Stable Diffusion 3; newer: with the attention of 3.5 medium."""
    more: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if newer else {}
    torch.manual_seed(5)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENTS, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8, **more,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_encoder(True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(True, 7), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder() if third else None, tokenizer_3=t5_tokenizer() if third else None,
    )  # fmt: skip


def flux(guided: bool = True) -> Any:
    """Return FLUX as dev is, guidance-distilled and shifted by size, or as schnell is."""
    torch.manual_seed(6)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    options: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0} if guided else {"shift": 1.0}
    return diffusers.FluxPipeline(
        transformer=lively(transformer), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**options),
        vae=vae(shift_factor=0.1, scaling_factor=0.4), text_encoder=clip_encoder(False), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def _sana_transformer(**more: Any) -> Any:
    """Return SANA's transformer; its pipelines take sides that 32 divides."""
    torch.manual_seed(7)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=2 * LATENTS, **more,
    )  # fmt: skip
    return lively(transformer)


def deep_vae() -> Any:
    """Return SANA's kind of autoencoder; it halves sides too."""
    torch.manual_seed(8)
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
    )  # fmt: skip


def sana(scheduler: Any = None) -> Any:
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=gemma_encoder(), vae=deep_vae(), transformer=_sana_transformer(),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def sana_sprint() -> Any:
    return diffusers.SanaSprintPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=gemma_encoder(), vae=deep_vae(),
        transformer=_sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        scheduler=diffusers.SCMScheduler(),
    )  # fmt: skip


def stable_diffusion(scheduler: Any, **more: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_encoder(False), tokenizer=clip_tokenizer(), unet=unet(**more), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip


def control(unet: Any) -> Any:
    """Return a ControlNet for a U-Net; its last layers, zero in a new one, are not."""
    torch.manual_seed(10)
    return lively(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4)))


def stable_diffusion_control(scheduler: Any) -> Any:
    plain = stable_diffusion(scheduler)
    return diffusers.StableDiffusionControlNetPipeline(**plain.components, controlnet=control(plain.unet))


def sdxl_control(scheduler: Any) -> Any:
    plain = sdxl(scheduler)
    parts = {name: part for name, part in plain.components.items() if part is not None}
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=control(plain.unet), add_watermarker=False)


def sdxl(scheduler: Any) -> Any:
    more: dict[str, Any] = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip_encoder(False), tokenizer=clip_tokenizer(), text_encoder_2=clip_encoder(True, 7),
        tokenizer_2=clip_tokenizer(), unet=unet(**more), scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def lcm() -> Any:
    return diffusers.LatentConsistencyModelPipeline(
        vae=vae(), text_encoder=clip_encoder(False), tokenizer=clip_tokenizer(), unet=unet(time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(), safety_checker=None, feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )  # fmt: skip


def pixart() -> Any:
    torch.manual_seed(9)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=16, sample_size=LATENTS, patch_size=2, caption_channels=32, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=vae(), transformer=lively(transformer),
        scheduler=ddim(),
    )  # fmt: skip


TURBO: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TURBO |= {"timestep_spacing": "trailing", "steps_offset": 1}


def ddim(**more: Any) -> Any:
    """Return DDIM's scheduler as Stable Diffusion takes it, except that its last step ends on data."""
    return diffusers.DDIMScheduler(**(TURBO | {"clip_sample": False, "set_alpha_to_one": True} | more))


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": sd3,
    "sd3-without-t5": lambda: sd3(third=False),
    "sd3.5": lambda: sd3(newer=True),
    "flux-dev": flux,
    "flux-schnell": lambda: flux(False),
    "sana": sana,
    "sana-sprint": sana_sprint,
    "sd-turbo": lambda: stable_diffusion(diffusers.EulerDiscreteScheduler(**TURBO)),
    "sdxl-turbo": lambda: sdxl(diffusers.EulerAncestralDiscreteScheduler(**TURBO)),
    "sd-control": lambda: stable_diffusion_control(ddim()),
    "sdxl-control": lambda: sdxl_control(diffusers.EulerAncestralDiscreteScheduler(**TURBO)),
    "lcm": lcm,
    "pixart": pixart,
    "sd-epsilon": lambda: stable_diffusion(ddim()),
    "sd-v": lambda: stable_diffusion(ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "sd-sample": lambda: stable_diffusion(ddim(prediction_type="sample")),
}


def save(name: str, folder: Path) -> Path:
    """Write one of PIPELINES into a folder."""
    PIPELINES[name]().save_pretrained(folder, safe_serialization=True)
    return folder


class Loader:
    """Write each tiny pipeline once, and load it as a map or as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        diffusers.utils.logging.disable_progress_bar()

    def path(self, name: str) -> str:
        folder = self.folder / name
        if not folder.exists():
            save(name, folder)
        return str(folder)

    def map(self, name: str, **options: Any) -> FlowMap:
        return FlowMap.from_pretrained(self.path(name), **options)

    def pipeline(self, name: str) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(self.path(name))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
