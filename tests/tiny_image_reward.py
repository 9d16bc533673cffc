"""A small random ImageReward in the format in which the real one is published, with pictures and prompts to score.

Everything is drawn with NumPy, so that an environment with the original package and one with ours see the same.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WORDS = "a red blue green circle square cross left right of above below the and two small large it is cafe naive"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *WORDS.split()]
VOCABULARY += [*dict.fromkeys(string.ascii_lowercase[1:] + string.digits)]  # "a" is a word already
VOCABULARY += [f"##{character}" for character in string.ascii_lowercase + string.digits]
MED: dict[str, Any] = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 96,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 40, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 2, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(VOCABULARY) + 2,
    "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip
SIZES = {"width": 128, "layers": 2, "patch": 16, "side": 224}
BERT = "bert-base-uncased"
EXAMPLES: Sequence[tuple[str, tuple[int, ...]]] = (  # prompt, shape of the picture
    ("a red circle left of the blue square", (3, 224, 224)),
    ("A RED Circle, left of... the Blue square!", (3, 224, 224)),
    ("a large green cross above two small squares and " * 6, (3, 224, 224)),
    ("", (3, 224, 224)),
    ("naïve café [ENC] and [DEC] 漢字 42 zebras", (3, 224, 224)),
    ("two small green crosses above it", (3, 160, 300)),
    ("the large blue square is below", (3, 401, 300)),
    ("a small circle", (1, 250, 227)),
)


def shapes(med: dict[str, Any], width: int, layers: int, patch: int, side: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the published checkpoint, by key."""
    hidden, inner, vision = med["hidden_size"], med["intermediate_size"], "blip.visual_encoder"
    found: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, width),
        f"{vision}.pos_embed": (1, (side // patch) ** 2 + 1, width),
        f"{vision}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{vision}.patch_embed.proj.bias": (width,),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, size: int) -> None:
        found.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    for i in range(layers):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm(f"{vision}.norm", width)
    text = "blip.text_encoder"
    found[f"{text}.embeddings.position_ids"] = (1, med["max_position_embeddings"])
    found[f"{text}.embeddings.word_embeddings.weight"] = (med["vocab_size"], hidden)
    found[f"{text}.embeddings.position_embeddings.weight"] = (med["max_position_embeddings"], hidden)
    norm(f"{text}.embeddings.LayerNorm", hidden)
    for i in range(med["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{i}"
        for attention, inputs in (("attention", hidden), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", hidden, hidden)
            linear(f"{layer}.{attention}.self.key", hidden, inputs)
            linear(f"{layer}.{attention}.self.value", hidden, inputs)
            linear(f"{layer}.{attention}.output.dense", hidden, hidden)
            norm(f"{layer}.{attention}.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm", hidden)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, hidden)
    for place, outputs, inputs in ((0, 1024, hidden), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        linear(f"mlp.layers.{place}", outputs, inputs)
    return found


def weights(med: dict[str, Any] = MED, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """Return random weights far from those of a fresh network: small features make the norms' epsilon visible."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, Tensor] = {}
    for key, shape in shapes(med, **(SIZES | sizes)).items():
        values = rng.standard_normal(shape)
        if key.endswith("position_ids"):
            values = np.arange(shape[1], dtype=np.int64)[None]
        elif len(shape) == 1:
            values = 0.1 * values + (1.0 if "orm" in key and key.endswith("weight") else 0.0)
        elif "visual" in key and len(shape) != 2:
            values = 0.03 * values / np.prod(shape[1:-1]) ** 0.5
        elif "embeddings" not in key:
            values = 1.5 * values / shape[1] ** 0.5
        drawn[key] = torch.from_numpy(values if values.dtype == np.int64 else values.astype(np.float32))
    return drawn


def save(folder: Path, tensors: dict[str, Tensor] | None = None, med: dict[str, Any] = MED, **sizes: int) -> Path:
    """Write ImageReward.pt, med_config.json and a folder with BERT's vocabulary."""
    (folder / BERT).mkdir(parents=True, exist_ok=True)
    torch.save(weights(med, **sizes) if tensors is None else tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(med))
    (folder / BERT / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


def natural(shape: Sequence[int], seed: int) -> Tensor:
    """Return a picture with the 1/f spectrum of photographs, in whole levels of 1/255; `shape` (C, H, W)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(shape[1])[:, None], np.fft.rfftfreq(shape[2])[None, :])
    frequency[0, 0] = np.inf
    spectrum = rng.standard_normal((shape[0], *frequency.shape, 2)) @ np.array([1, 1j]) / frequency
    picture = np.fft.irfft2(spectrum, s=tuple(shape[1:]))
    levels = (255 * (0.5 + 0.22 * picture / picture.std((1, 2), keepdims=True))).clip(0, 255).round()
    return torch.from_numpy(levels / 255).float()


def pictures() -> list[Tensor]:
    """Return the pictures of the examples, each (C, H, W)."""
    return [natural(shape, seed) for seed, (_, shape) in enumerate(EXAMPLES)]


def to_pil(picture: Tensor) -> Image.Image:
    """Return a picture (1 or 3, H, W) in [0, 1] as one of Pillow, grey or RGB."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
