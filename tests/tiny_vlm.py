"""Small random models of the Qwen-VL family, saved in the format in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
MERGES = (("y", "e"), ("ye", "s"), ("Y", "e"), ("Ye", "s"), ("n", "o"), ("N", "o"))  # the words that are one token
PATCH, MERGE, LEAST, MOST = 4, 2, 16 * 16, 40 * 40  # pixels; least and most: of a whole picture
TEXT_ONLY = "{% for message in messages %}{{ message.role + ': ' + message.content[-1].text + '\n' }}{% endfor %}"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION: dict[str, Any] = {
    "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # transformers' names, vision's and text's own
    "qwen2_vl": ("Qwen2VL", {"embed_dim": 32, "hidden_size": 32}, {"rope_parameters": ROPE}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16,
         "fullatt_block_indexes": [1]},
        {"rope_parameters": ROPE},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16,
         "deepstack_visual_indexes": [0]},
        {"rope_parameters": ROPE | {"mrope_interleaved": True}, "head_dim": 16},
    ),
}  # fmt: skip


def save(folder: Path, family: str = "qwen3_vl", template: str = TEMPLATE, seed: int = 0) -> Path:
    """Write a model of two layers each for pictures and text, its tokenizer, chat template and preprocessing.

    As in the published folders, the tokenizer has a template of its own, which knows no pictures.
    """
    import transformers

    numbers = save_tokenizer(folder)
    name, vision, text = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text, "vocab_size": len(numbers) + 3},  # padded, as the published ones are
        vision_config={**VISION, **vision},
        image_token_id=numbers["<|image_pad|>"],
        video_token_id=numbers["<|video_pad|>"],
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        for parameter in model.parameters():  # a fresh network hardly tells pictures apart
            if parameter.ndim > 1:
                parameter.data.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
        model.model.language_model.embed_tokens.weight.data.normal_()
    model.save_pretrained(folder)
    transformers.Qwen2VLImageProcessor(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": LEAST, "longest_edge": MOST}
    ).save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def save_tokenizer(folder: Path) -> dict[str, int]:
    """Write a tokenizer of bytes with a few words, and return its tokens."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *("".join(pair) for pair in MERGES)]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[*MERGES],  # type: ignore[arg-type]
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=TEXT_ONLY,
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEXT_ONLY}))
    return tokenizer.get_vocab()
