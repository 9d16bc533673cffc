"""What tuning and steering published models hold in memory at most, counted without their weights and without a GPU.

    python benchmarks/memory.py --write        the tables of docs/memory.md; one core, ten minutes, little memory
    python benchmarks/memory.py --only sana    some models, printed

Networks, decoders and text encoders are built from published models' settings, and the size of the network stands
beside that which was published; their steps run on shapes alone (steerfm.commands.shapes), as `steerfm env --plan`
does it. One picture at a time. Weights are bfloat16, or of 8 bits in linear layers, LoRA of rank 16 and its AdamW
float32, texts were read before and their encoders are gone; the decoder is worked out again in the backward pass, as
steerfm always does. The reward is of PickScore's size, CLIP ViT-H/14 in float32. FLOPs of matrix products, convolutions
and attention of a step. Seconds are FLOPs over a share of what a card can do, and no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from steerfm import BestOfN, Compositional, DirectBackprop, FlowMap, LookAheadGuidance
from steerfm.backbones import LoRA, two_times
from steerfm.backbones.pipeline_files import library
from steerfm.commands.plan import follow_batch, follow_fit
from steerfm.commands.plan_course import Course, no_weights
from steerfm.config import Composed
from steerfm.images import resize
from steerfm.modules import FlowMapTraining, RewardFineTuning, SteeredSampling
from steerfm.reward import Reward
from steerfm.types import Condition, Values

GIB = 2**30
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- begin: benchmarks/memory.py -->", "<!-- end: benchmarks/memory.py -->"
SHARE = 0.35  # of the peak that a step is taken to reach
CARDS = {"24 GB card": 165e12, "H100": 989e12}  # FLOP/s, bfloat16 dense: NVIDIA's for RTX 4090 and H100 SXM
aten = torch.ops.aten
console = Console(width=None if os.isatty(1) else 150)

KL = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 1024,
}  # fmt: skip
DC = {
    "_class_name": "AutoencoderDC", "latent_channels": 32, "scaling_factor": 0.41407,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "upsample_block_type": "interpolate", "downsample_block_type": "Conv",
}  # fmt: skip
SANA_600M = {
    "_class_name": "SanaTransformer2DModel", "num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32,
    "num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "use_linear_projection": True, "layers_per_block": 2,
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
TURBO = {
    "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012,
}  # fmt: skip
CLIP_L = {"architectures": "CLIPTextModel", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_H = {"architectures": "CLIPTextModel", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
CLIP_G = {
    "architectures": "CLIPTextModelWithProjection", "hidden_size": 1280, "intermediate_size": 5120,
    "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
T5_XXL = {
    "architectures": "T5EncoderModel", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
GEMMA_2B = {"architectures": "Gemma2Model"}  # transformers' own settings are those of 2B


# What is done, and at how many pixels a side.
FEW = {"best of 8, one by one": [512], "tune, 1 jump, checkpointing": [512]}
DISTILLED = {
    "distil, 4 rows, checkpointing": [512],
    "tune, last of 4 jumps, checkpointing": [512],
    "best of 8 in 4 jumps, one by one": [512],
}
SD_15 = {
    **UNET, "use_linear_projection": False, "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8,
    "cross_attention_dim": 768,
}  # fmt: skip
SDXL = {
    **UNET, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
FLUX = {"_class_name": "FluxTransformer2DModel"}
FLUX_VAE = {**KL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
SD_VAE = {**KL, "scaling_factor": 0.18215}
SDXL_VAE = {**KL, "scaling_factor": 0.13025}


@dataclass(frozen=True)
class Model:
    """Hold a published pipeline: its class, the settings of its parts, its text encoders, and what it is told.

    published: the numbers of its network, as said by those who made it, and where. told: name -> shape of one
    prompt's condition. work: name -> pixels a side. options: of `FlowMap.from_pretrained`.
    """

    name: str
    pipeline: str
    published: tuple[str, str]
    network: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    texts: Sequence[dict[str, Any]]
    told: dict[str, tuple[int, ...]]
    work: dict[str, list[int]]
    part: str = "transformer"
    options: dict[str, Any] = field(default_factory=dict)


GEMMA_TOLD: dict[str, tuple[int, ...]] = {"embedding": (300, 2304), "embedding_mask": (300,)}
XL_TOLD: dict[str, tuple[int, ...]] = {"embedding": (77, 2048), "pooled": (1280,)}
FLUX_TOLD: dict[str, tuple[int, ...]] = {"embedding": (512, 4096), "pooled": (768,)}
SDXL_PAPER = "arXiv 2307.01952, table 1"
MODELS = (
    Model(
        "SANA-Sprint 0.6B", "SanaSprintPipeline", ("0.6B", "arXiv 2503.09641"),
        {**SANA_600M, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, DC,
        {"_class_name": "SCMScheduler"}, [GEMMA_2B], GEMMA_TOLD,
        {"best of 8, one by one": [1024], "guidance, 4 steps": [512], "tune, 1 jump": [512],
         "tune, 1 jump, checkpointing": [512, 1024], "tune, 2 jumps, checkpointing": [1024]},
    ),
    Model(
        "SD-Turbo", "StableDiffusionPipeline", ("865M", SDXL_PAPER),
        {**UNET, "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20],
         "cross_attention_dim": 1024},
        SD_VAE, TURBO, [CLIP_H], {"embedding": (77, 1024)}, FEW, "unet",
    ),
    Model(
        "SDXL-Turbo", "StableDiffusionXLPipeline", ("2.6B", SDXL_PAPER), SDXL, SDXL_VAE,
        {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}, [CLIP_L, CLIP_G], XL_TOLD,
        {"best of 8, one by one": [512], "best of 8, at once": [512], "guidance, 4 steps": [512], "tune, 1 jump": [512],
         "tune, 1 jump, checkpointing": [512, 1024]}, "unet",
    ),
    Model(
        "LCM_Dreamshaper_v7", "LatentConsistencyModelPipeline", ("860M and a guidance input", SDXL_PAPER),
        {**SD_15, "time_cond_proj_dim": 256}, SD_VAE, {"_class_name": "LCMScheduler"}, [CLIP_L],
        {"embedding": (77, 768)}, FEW, "unet",
    ),
    Model(
        "SD 1.5", "StableDiffusionPipeline", ("860M", SDXL_PAPER), SD_15, SD_VAE, {"_class_name": "DDIMScheduler"},
        [CLIP_L], {"embedding": (77, 768)}, {"distil, 4 rows, checkpointing": [512]}, "unet",
    ),
    Model(
        "SDXL", "StableDiffusionXLPipeline", ("2.6B", SDXL_PAPER), SDXL, SDXL_VAE, {"_class_name": "DDIMScheduler"},
        [CLIP_L, CLIP_G], XL_TOLD, {"distil, 4 rows, checkpointing": [1024]}, "unet",
    ),
    Model(
        "PixArt-Sigma 512", "PixArtSigmaPipeline", ("0.6B", "arXiv 2403.04692"),
        {"_class_name": "PixArtTransformer2DModel", "num_layers": 28, "sample_size": 64, "cross_attention_dim": 1152,
         "caption_channels": 4096, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
         "out_channels": 8, "patch_size": 2, "norm_type": "ada_norm_single", "use_additional_conditions": False},
        SDXL_VAE, {"_class_name": "DPMSolverMultistepScheduler"}, [T5_XXL],
        {"embedding": (300, 4096), "embedding_mask": (300,)}, {"distil, 4 rows, checkpointing": [512]},
    ),
    Model(
        "SD3.5-medium", "StableDiffusion3Pipeline", ("2.5B", "the model card"),
        {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
         "caption_projection_dim": 1536, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
         "qk_norm": "rms_norm"},
        {**KL, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}, FLOW,
        [CLIP_L, CLIP_G, T5_XXL], {"embedding": (333, 4096), "pooled": (2048,)}, DISTILLED,
    ),
    Model(
        "SANA 1.6B", "SanaPipeline", ("1.6B", "arXiv 2410.10629"), {"_class_name": "SanaTransformer2DModel"}, DC, FLOW,
        [GEMMA_2B], GEMMA_TOLD, {**DISTILLED, "distil, 4 rows, checkpointing": [512, 1024]},
    ),
    Model(
        "FLUX.1-schnell, 8 bits", "FluxPipeline", ("12B", "the model card"), {**FLUX, "guidance_embeds": False},
        FLUX_VAE, FLOW, [CLIP_L, T5_XXL], FLUX_TOLD,
        {"best of 8 in 4 jumps, one by one": [512], "tune, last of 4 jumps, checkpointing": [512]},
        options={"quantised": "int8"},
    ),
    Model(
        "FLUX.1-dev, 8 bits", "FluxPipeline", ("12B", "the model card"), {**FLUX, "guidance_embeds": True}, FLUX_VAE,
        FLOW, [CLIP_L, T5_XXL], FLUX_TOLD, {"distil, 4 rows, checkpointing": [512, 1024]},
        options={"quantised": "int8"},
    ),
    Model(
        "FLUX.1-dev", "FluxPipeline", ("12B", "the model card"), {**FLUX, "guidance_embeds": True}, FLUX_VAE, FLOW,
        [CLIP_L, T5_XXL], FLUX_TOLD, {"distil, 4 rows, checkpointing": [512]},
    ),
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Count the FLOPs of products, convolutions and attention, by PyTorch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=made)
        return made


class Given(nn.Module):
    """Tell every prompt's condition by its shape, as if it had been read before."""

    def __init__(self, told: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.told = told

    def forward(self, prompts: Sequence[str]) -> Condition:
        return self.null(len(prompts))

    def null(self, n: int) -> Condition:
        return Condition({name: torch.zeros(n, *shape) for name, shape in self.told.items()})


class Preference(Reward):
    """A reward of PickScore's size: CLIP ViT-H/14 in float32."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "patch_size": 14,
        }  # fmt: skip
        self.model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Values:
        return self.model.get_image_features(resize(images, (224, 224))).pooler_output.mean(1)


def written(model: Model, folder: Path) -> Path:
    """Write a pipeline's settings into a folder, as save_pretrained does, with files of no weights; return it."""
    from steerfm.backbones.families import FAMILIES

    family = FAMILIES[model.pipeline]
    parts = {model.part: model.network, "vae": model.vae, "scheduler": model.scheduler}
    index: dict[str, Any] = {"_class_name": model.pipeline}
    for part, settings in parts.items():
        index[part] = ["diffusers", settings["_class_name"]]
    for encoder, tokenizer in family.texts.items():
        index |= {encoder: ["transformers", "CLIPTextModel"], tokenizer: ["transformers", "CLIPTokenizer"]}
        parts |= {encoder: {}, tokenizer: {}}
    for part, settings in parts.items():
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(settings))
        (folder / part / "none.safetensors").touch()
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def text_encoders(model: Model) -> int:
    """Return the bytes of a model's text encoders in bfloat16."""
    import transformers

    total = 0
    for settings in model.texts:
        kind = getattr(transformers, settings["architectures"])
        rest = {name: value for name, value in settings.items() if name != "architectures"}
        with torch.device("meta"):
            total += 2 * sum(p.numel() for p in kind(kind.config_class(**rest)).parameters())
    return total


@dataclass(frozen=True)
class Row:
    """Hold one line of the table: bytes and FLOPs."""

    model: str
    work: str
    pixels: int
    weights: int
    peak: int
    phase: str
    flops: int

    def cells(self) -> list[str]:
        seconds = [f"{self.flops / SHARE / peak:.2g}" for peak in CARDS.values()]
        sizes = [f"{self.weights / GIB:.1f}", f"{self.peak / GIB:.1f}"]
        return [self.model, self.work, str(self.pixels), *sizes, self.phase, f"{self.flops / 1e12:.3g}", *seconds]


SIZES = ("network of", "published", "where", "numbers as built here", "text encoders, bfloat16")
TITLES = ("model", "work", "pixels", "weights", "peak", "in", "TFLOP", *(f"s, {card}" for card in CARDS))


def loaded(folder: Path, model: Model, size: int, **options: Any) -> FlowMap:
    """Return a model as a flow map in bfloat16, told what prompts would tell it."""
    options |= model.options
    flow_map = FlowMap.from_pretrained(folder, dtype="bfloat16", size=size, guidance_scale=1.0, **options)
    flow_map.conditioner = Given(model.told)
    return flow_map


def tuned(
    jumps: int, checkpointing: bool, last: int | None, folder: Path, model: Model, size: int, course: Course
) -> None:
    """Take two steps of direct fine-tuning of LoRA."""
    kind = None if jumps == 1 else "velocity"
    flow_map = loaded(folder, model, size, kind=kind, checkpointing=checkpointing)
    if last is not None:
        flow_map = two_times(flow_map)
    method = DirectBackprop(jumps, penalty="sample", checkpointing=checkpointing and jumps > 1, last=last)
    module = RewardFineTuning(
        flow_map, Preference(), method, adapter=LoRA(16), optimizer=partial(AdamW, lr=1e-4), micro_batch=1,
        consistency=None,
    )  # fmt: skip
    module._monitor = lambda x0, work: None  # of every 25th step
    follow_fit(module, {"prompt": [""]}, course)


def distilled(checkpointing: bool, folder: Path, model: Model, size: int, course: Course) -> None:
    """Take two steps of learning to jump by LoRA, on latents and texts that were kept."""
    student = LoRA(16)(two_times(loaded(folder, model, size, kind="velocity", checkpointing=checkpointing)))
    module = FlowMapTraining(student, Compositional(), optimizer=partial(AdamW, lr=1e-4), prompt_dropout=0.0)
    follow_fit(module, {"x0": torch.zeros(4, *student.data_shape), "prompt": [""] * 4}, course)


def steered(method: Any, folder: Path, model: Model, size: int, course: Course) -> None:
    """Draw one steered sample."""
    kind = "velocity" if isinstance(method, LookAheadGuidance) else None
    module = SteeredSampling(loaded(folder, model, size, kind=kind), method, Preference())
    follow_batch(module, {"prompt": [""], "seed": [0]}, course)


Work = Callable[[Path, Model, int, Course], None]
WORK: dict[str, Work] = {
    "best of 8, one by one": partial(steered, BestOfN(n=8, jumps=1, micro_batch=1)),
    "best of 8, at once": partial(steered, BestOfN(n=8, jumps=1)),
    "best of 8 in 4 jumps, one by one": partial(steered, BestOfN(n=8, jumps=4, micro_batch=1)),
    "guidance, 4 steps": partial(steered, LookAheadGuidance(4)),
    "tune, 1 jump": partial(tuned, 1, False, None),
    "tune, 1 jump, checkpointing": partial(tuned, 1, True, None),
    "tune, 2 jumps, checkpointing": partial(tuned, 2, True, None),
    "tune, last of 4 jumps, checkpointing": partial(tuned, 4, True, 1),
    "distil, 4 rows, checkpointing": partial(distilled, True),
}


def counted(name: str, work: Work, folder: Path, model: Model, size: int) -> Row:
    """Return what one kind of work holds and computes; FLOPs are a step's, or a sample's."""
    course = Course(Composed("", {"trainer": {"accelerator": "gpu", "gradient_clip_val": 1.0}}))
    steps = 1 if "tune" not in name and "distil" not in name else 2
    with no_weights(), course.shapes, Operations() as operations:
        work(folder, model, size, course)
    kinds = course.shapes.peak.kinds
    weights = sum(kinds.get(kind, 0) for kind in ("weights, trained", "weights, frozen", "autoencoder", "rewards"))
    peak = course.shapes.peak
    return Row(model.name, name, size, weights, peak.size, peak.phase, operations.flops // steps)


def network_size(model: Model) -> int:
    """Return how many numbers the files of a model's network hold."""
    settings = dict(model.network)
    kind = getattr(library("diffusers"), settings.pop("_class_name"))
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in kind(**settings).state_dict().values())


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """Return a table as Markdown, whose first columns are words and the rest numbers."""
    lines = [titles, [":--"] * words + ["--:"] * (len(titles) - words), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(page: str) -> None:
    """Put what was counted between its markers in docs/memory.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the models' names")
    parser.add_argument("--work", default="", help="a part of the work's names")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/memory.md")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.work):
        parser.error("--write is for all rows: leave --only and --work out.")
    sizes, rows = [], []
    for model in MODELS:
        if arguments.only.lower() not in model.name.lower():
            continue
        texts = f"{text_encoders(model) / GIB:.1f} GiB"
        sizes.append([model.name, model.published[0], model.published[1], f"{network_size(model):,}", texts])
        console.print(f"{model.name}: {sizes[-1][3]} numbers; text encoders {texts}, read and gone")
        with tempfile.TemporaryDirectory() as folder:
            pipeline = written(model, Path(folder) / "pipeline")
            for name, size in ((name, size) for name, sizes in model.work.items() for size in sizes):
                if arguments.work not in name:
                    continue
                start = time.perf_counter()
                rows.append(counted(name, WORK[name], pipeline, model, size).cells())
                console.print(f"{' | '.join(rows[-1])}   ({time.perf_counter() - start:.0f} s)")
    page = f"{markdown(TITLES, rows, 2)}\n\n{markdown(SIZES, sizes, 3)}"
    console.print(page, soft_wrap=True)
    if arguments.write:
        write(page)


if __name__ == "__main__":
    main()
