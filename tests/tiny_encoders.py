"""Small text encoders with random weights, written in the formats in which real ones are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WORDS = (
    "a", "red", "blue", "green", "circle", "square", "cross", "left", "right", "of", "above", "below", "the", "and",
    "two", "small", "large", "it", "is",
)  # fmt: skip
TOKENS = ["<pad>", "</s>", "<unk>", *WORDS]
LENGTH = 12  # the most tokens that the CLIP models read

OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words that ends every text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {token: i for i, token in enumerate(TOKENS)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def save_t5(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a T5 of two layers, with its decoder, and a tokenizer; embeddings have dimension 16."""
    from transformers import T5Config, T5ForConditionalGeneration

    options: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5ForConditionalGeneration(T5Config(**(options | config))).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_clip_text(folder: Path, seed: int = 0) -> Path:
    """Write a CLIP text encoder of transformers with two layers, and a tokenizer; embeddings have dimension 16."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(TOKENS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPTextModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_open_clip(folder: Path, seed: int = 0, config: dict[str, Any] = OPEN_CLIP) -> Path:
    """Write an open_clip model in its published format; embeddings have dimension 8."""
    from open_clip import CLIP, CustomTextCLIP

    folder.mkdir(parents=True, exist_ok=True)
    model = CustomTextCLIP if config.get("custom_text") else CLIP
    towers = {key: value for key, value in config.items() if key != "custom_text"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(model(**towers).state_dict(), folder / "open_clip_model.safetensors")
    mean_and_std = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": mean_and_std})
    (folder / "open_clip_config.json").write_text(text)
    return folder


SAVERS: dict[str, Callable[..., Path]] = {"t5": save_t5, "clip": save_clip_text, "open_clip": save_open_clip}
