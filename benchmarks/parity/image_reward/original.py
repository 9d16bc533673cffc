"""Score pictures with the original ImageReward package, in an environment of its own; compare.py starts it.

    .venv-image-reward/bin/python benchmarks/parity/image_reward/original.py FOLDER

FOLDER holds ImageReward.pt, med_config.json, bert-base-uncased/vocab.txt, prompts.json, sizes.json and NUMBER.png;
original.safetensors is written beside them: scores (N,), tokens (N, 35), and the gradient of every score to its
preprocessed picture (N, 3, 224, 224). The package knows one vision tower, ViT-L, and one width of its head; both are
replaced by its own classes in the sizes of sizes.json. Nothing else is.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file


def load(sizes: dict[str, int]) -> Any:
    """Return the original model with the checkpoint in the current folder."""
    import ImageReward

    scorer: Any = importlib.import_module("ImageReward.ImageReward")
    blip: Any = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vit: Any = importlib.import_module("ImageReward.models.BLIP.vit")
    mlp, width = scorer.MLP, sizes["width"]
    tower = {"patch_size": sizes["patch"], "embed_dim": width, "depth": sizes["layers"], "num_heads": width // 64}
    blip.create_vit = lambda kind, image_size, *_: (vit.VisionTransformer(img_size=image_size, **tower), width)
    scorer.MLP = lambda _: mlp(sizes["hidden"])
    return ImageReward.load("ImageReward.pt", device="cpu", med_config="med_config.json")


def main() -> None:
    """Write original.safetensors."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(sys.argv[1])  # the package asks for the tokenizer "bert-base-uncased", which is a folder here
    model = load(json.loads(Path("sizes.json").read_text(encoding="utf-8")))
    scores, tokens, gradients = [], [], []
    for i, prompt in enumerate(json.loads(Path("prompts.json").read_text(encoding="utf-8"))):
        picture = Image.open(f"{i}.png")
        scores.append(model.score(prompt, picture))
        text = model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        pixels = model.preprocess(picture)[None].requires_grad_(True)
        model.score_gard(text.input_ids, text.attention_mask, pixels).sum().backward()
        tokens.append(text.input_ids[0])
        gradients.append(pixels.grad[0])
    found = {"scores": torch.tensor(scores), "tokens": torch.stack(tokens), "gradients": torch.stack(gradients)}
    save_file(found, "original.safetensors")


if __name__ == "__main__":
    main()
