"""Small random CLIP, SigLIP, HPS and aesthetic heads, in the files and keys in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SIDE, LENGTH, EMBEDDING = 32, 24, 16
PICTURES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "projection_dim": EMBEDDING,
}
TINY: dict[str, Any] = {
    "embed_dim": EMBEDDING,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
HPS = "tiny-hps"  # the name under which open_clip knows TINY, once saved


def stir(model: nn.Module) -> None:
    """Make features differ between pictures and between texts, which those of a fresh network hardly do."""
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            parameter.data.normal_()
        elif parameter.ndim > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)


def save_tokenizer(folder: Path) -> int:
    """Write CLIP's tokenizer of single letters, without merges, and return how many tokens it knows."""
    from transformers import CLIPTokenizer

    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # printable bytes stand for themselves
    letters = [chr(i) for i in letters + [256 + i for i in range(256 - len(letters))]]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return len(words)


def save_clip(folder: Path, size: int = SIDE, crop: int = SIDE) -> Path:
    """Write a CLIP of transformers: config.json, model.safetensors, tokenizer and preprocessor_config.json."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    count = save_tokenizer(folder)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": count, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": count - 2, "eos_token_id": count - 1, "pad_token_id": 1}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=PICTURES, text_config=text, projection_dim=EMBEDDING))
    stir(model)
    model.logit_scale.data.fill_(float(np.log(100)))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """Write a SigLIP of transformers, without a tokenizer."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 40, "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=PICTURES, text_config=text))
    stir(model)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


class Published(nn.Module):
    """LAION's head as its repository builds it: the layers 0, 2, 4, 6 and 7 of a row, with dropout between."""

    def __init__(self, width: int = EMBEDDING) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip
        for parameter in self.parameters():
            parameter.data.mul_(2)


class PublishedV25(nn.Module):
    """The head of v2.5 as its repository builds it: the layers 0, 2, 4, 6 and 8."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.scoring_head = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.5), nn.Linear(1024, 128), nn.Dropout(0.5),
            nn.Linear(128, 64), nn.Dropout(0.5), nn.Linear(64, 16), nn.Dropout(0.2), nn.Linear(16, 1),
        )  # fmt: skip
        for parameter in self.parameters():
            parameter.data.mul_(2)


def save_head(folder: Path) -> Path:
    """Write LAION's head v2 for embeddings of `save_clip`, and return the file."""
    torch.manual_seed(1)
    torch.save(Published().state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder / "sac+logos+ava1-l14-linearMSE.pth"


def save_head_v25(folder: Path) -> Path:
    """Write the head v2.5 for embeddings of `save_siglip`, and return the file."""
    torch.manual_seed(1)
    torch.save(PublishedV25().state_dict(), folder / "aesthetic_predictor_v2_5.pth")
    return folder / "aesthetic_predictor_v2_5.pth"


def save_hps(folder: Path) -> Path:
    """Write HPS_v2.1_compressed.pt of a CLIP that open_clip then knows by the name `HPS`, and return the folder."""
    import open_clip

    (folder / f"{HPS}.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / f"{HPS}.json")
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(TINY)))
    stir(model)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder
