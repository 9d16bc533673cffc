"""What tuning and steering published models hold in memory at most, counted without their weights and without a GPU.

    python benchmarks/memory.py                       one core, no memory to speak of; prints one table
    python benchmarks/memory.py --only sana --write   some models; --write puts the table into docs/memory.md

Networks, decoders and text encoders of the published sizes are built from their settings; their steps run on shapes
alone (steerfm.commands.shapes), as `steerfm env --plan` does it. One picture at a time. Weights are bfloat16, LoRA of
rank 16 and its AdamW float32, texts are read before and their encoders are gone; the decoder is worked out again in
the backward pass, as steerfm always does. The reward is of PickScore's size, CLIP ViT-H/14 in float32. FLOPs of
matrix products, convolutions and attention of a step. Seconds are FLOPs over a share of what a card can do, and no
measurement.
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
from steerfm.commands.plan import Course, follow_batch, follow_fit, no_weights
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


@dataclass(frozen=True)
class Model:
    """Hold a published pipeline: its class, the settings of its parts, its text encoders, and what it is told.

    told: name -> shape of one prompt's condition. velocity: whether it can be distilled to jump.
    """

    name: str
    pipeline: str
    network: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    texts: Sequence[dict[str, Any]]
    told: dict[str, tuple[int, ...]]
    work: Sequence[str]
    part: str = "transformer"
    named: dict[str, dict[str, Any]] = field(default_factory=dict)


TUNE = ("direct", "steer")
MODELS = (
    Model(
        "SANA-Sprint 0.6B", "SanaSprintPipeline",
        {**SANA_600M, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, DC,
        {"_class_name": "SCMScheduler"}, [GEMMA_2B], {"embedding": (300, 2304), "embedding_mask": (300,)}, TUNE,
    ),
    Model(
        "SD-Turbo", "StableDiffusionPipeline",
        {**UNET, "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20],
         "cross_attention_dim": 1024},
        {**KL, "scaling_factor": 0.18215}, TURBO, [CLIP_H], {"embedding": (77, 1024)}, TUNE, "unet",
    ),
    Model(
        "SDXL-Turbo", "StableDiffusionXLPipeline",
        {**UNET, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
         "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10],
         "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
         "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
        {**KL, "scaling_factor": 0.13025}, {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"},
        [CLIP_L, CLIP_G], {"embedding": (77, 2048), "pooled": (1280,)}, TUNE, "unet",
    ),
    Model(
        "SD3.5-medium", "StableDiffusion3Pipeline",
        {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
         "caption_projection_dim": 1536, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
         "qk_norm": "rms_norm"},
        {**KL, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}, FLOW,
        [CLIP_L, CLIP_G, T5_XXL], {"embedding": (333, 4096), "pooled": (2048,)}, ("direct", "distil"),
    ),
    Model(
        "SANA 1.6B", "SanaPipeline", {"_class_name": "SanaTransformer2DModel"}, DC, FLOW, [GEMMA_2B],
        {"embedding": (300, 2304), "embedding_mask": (300,)}, ("distil",),
    ),
    Model(
        "FLUX.1-dev", "FluxPipeline", {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        {**KL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}, FLOW, [CLIP_L, T5_XXL],
        {"embedding": (512, 4096), "pooled": (768,)}, ("distil",),
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


TITLES = ("model", "work", "pixels", "weights", "peak", "in", "TFLOP", *(f"s, {card}" for card in CARDS))


def loaded(folder: Path, model: Model, size: int, **options: Any) -> FlowMap:
    """Return a model as a flow map in bfloat16, told what prompts would tell it."""
    flow_map = FlowMap.from_pretrained(folder, dtype="bfloat16", size=size, guidance_scale=1.0, **options)
    flow_map.conditioner = Given(model.told)
    return flow_map


def tuned(jumps: int, checkpointing: bool, folder: Path, model: Model, size: int, course: Course) -> None:
    """Take two steps of direct fine-tuning of LoRA."""
    kind = None if jumps == 1 else "velocity"
    flow_map = loaded(folder, model, size, kind=kind, checkpointing=checkpointing)
    method = DirectBackprop(jumps, penalty="sample", checkpointing=checkpointing and jumps > 1)
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
WORK: dict[str, dict[str, Work]] = {
    "direct": {
        "tune, 1 jump": partial(tuned, 1, False),
        "tune, 1 jump, checkpointing": partial(tuned, 1, True),
        "tune, 2 jumps": partial(tuned, 2, False),
        "tune, 2 jumps, checkpointing": partial(tuned, 2, True),
    },
    "steer": {
        "best of 8, one by one": partial(steered, BestOfN(n=8, jumps=1, micro_batch=1)),
        "best of 8, at once": partial(steered, BestOfN(n=8, jumps=1)),
        "guidance, 4 steps": partial(steered, LookAheadGuidance(4)),
    },
    "distil": {
        "distil, 4 rows": partial(distilled, False),
        "distil, 4 rows, checkpointing": partial(distilled, True),
    },
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


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "|".join([" :-- "] * 2 + [" --: "] * (len(TITLES) - 2)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


def write(table: str) -> None:
    """Put the table between its markers in docs/memory.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Count and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the models' names")
    parser.add_argument("--work", default="", help="a part of the work's names")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="pixels a side")
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    arguments = parser.parse_args()
    rows = []
    for model in MODELS:
        if arguments.only.lower() not in model.name.lower():
            continue
        console.print(f"{model.name}: text encoders {text_encoders(model) / GIB:.1f} GiB, read and gone")
        with tempfile.TemporaryDirectory() as folder:
            pipeline = written(model, Path(folder) / "pipeline")
            for kind in model.work:
                for name, work in WORK[kind].items():
                    if arguments.work not in name:
                        continue
                    for size in arguments.sizes:
                        start = time.perf_counter()
                        rows.append(counted(name, work, pipeline, model, size))
                        console.print(f"{' | '.join(rows[-1].cells())}   ({time.perf_counter() - start:.0f} s)")
    console.print(markdown(rows), soft_wrap=True)
    if arguments.write:
        write(markdown(rows))


if __name__ == "__main__":
    main()
