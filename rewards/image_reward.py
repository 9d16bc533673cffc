"""ImageReward: how much people would like a picture for its prompt, learnt from 137 000 of their comparisons.

Model: BLIP (ViT-L/16 and a BERT that looks at its patches) with five linear layers, `ImageReward.pt` and
`med_config.json` of the hub repository zai-org/ImageReward (once THUDM/ImageReward), run by transformers' BLIP
classes; the tokenizer is bert-base-uncased. Source: Xu et al. 2023, arXiv 2304.05977, github.com/zai-org/ImageReward.
Preprocessing: 224 pixels, bicubic, cut out of the middle, CLIP's mean and std, in float32, differentiable.
Range: standardised on the authors' data, mostly -2 to 2. Licence: Apache-2.0. Memory: 1.8 GB.
Fooled by: prompts longer than 35 tokens, whose end it does not read (it warns), what lies outside the middle square,
and saturated colours and fine patterns, towards which optimisation drifts once the prompt is met.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.errors import RewardError
from steerfm.reward import Reward
from steerfm.rewards._open_clip import preprocess
from steerfm.rewards._transformers import explained, find_file, read_tensors

log = logging.getLogger(__name__)

MODEL, BERT = "zai-org/ImageReward", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, in the authors' code
TOKENS = 35
ADDED_TOKENS = ["[DEC]", "[ENC]"]  # BLIP's own, after BERT's vocabulary
HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}  # its linear layers, by place, and how wide they are
WIDTH_OF_A_HEAD = 64  # in all vision towers of BLIP
PREPROCESSING = {
    "resize_mode": "shortest",
    "interpolation": "bicubic",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
TEXT_OPTIONS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id",
)  # fmt: skip
PUBLISHED = (  # ours, the checkpoint's
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision.post_layernorm.", "blip.visual_encoder.norm."),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    ("text.", "blip.text_encoder."),
    ("head.", "mlp.layers."),
)
UNUSED = {  # what the checkpoint holds beside: the heads of BLIP's own training, and 0, 1, 2, ...
    "blip.vision_proj.weight", "blip.vision_proj.bias", "blip.text_proj.weight", "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}  # fmt: skip


class ImageReward(Reward):
    """Score how much people would like a picture for its prompt: about 0 on average, 1 for each standard deviation.

    `model`: a folder with ImageReward.pt and med_config.json, or a hub id. `tokenizer`: a folder or a hub id with
    the vocabulary of bert-base-uncased; left out, the folder itself, or that repository of the hub. `prompt` fixes one
    text for every sample. `vision_layers`: 24 in the published file; it is given, not counted, so that a file with
    blocks missing is noticed.
    Raises RewardError where a file is missing or is not used to the last key.
    """

    def __init__(
        self,
        model: str | Path = MODEL,
        tokenizer: str | Path | None = None,
        prompt: str | None = None,
        *,
        vision_layers: int = 24,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if prompt is not None and not isinstance(prompt, str):
            raise RewardError(f"'{self.name}' fixes one prompt for all pictures, got {type(prompt).__name__}.")
        self.prompt, self.needs_prompt = prompt, prompt is None
        self.model: Any = load(model, vision_layers, cache_dir)
        if tokenizer is None:
            tokenizer = model if Path(model).expanduser().exists() else BERT
        self.tokenizer = load_tokenizer(tokenizer, self.model["text"].config.vocab_size, cache_dir)
        self._preprocessing = PREPROCESSING | {"size": self.model["vision"].config.image_size}
        self._warned = False

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the standardised reward of each picture with its prompt; (B,)."""
        texts = list(prompts) if self.prompt is None else [self.prompt] * len(images)
        tokens = self.tokens(texts)
        with torch.autocast(images.device.type, enabled=False):
            pictures = preprocess(images, self._preprocessing)
            patches = self.model["vision"](pixel_values=pictures).last_hidden_state
            words = self.model["text"](
                input_ids=tokens["input_ids"].to(images.device),
                attention_mask=tokens["attention_mask"].to(images.device),
                encoder_hidden_states=patches,
            ).last_hidden_state
            return (self.model["head"](words[:, 0]).squeeze(1) - MEAN) / STD

    def tokens(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return input_ids and attention_mask, as long as the longest text, at most 35; says once that texts are cut.

        The authors pad to 35, which changes nothing but the time: padding is masked.
        """
        if not self._warned:
            self._warn_of_cuts(texts)
        return self.tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        for text, ids in zip(texts, self.tokenizer(list(texts), verbose=False)["input_ids"], strict=True):
            if len(ids) > TOKENS:
                self._warned = True
                log.warning(
                    "'%s' reads the first %d tokens of a prompt and ignores the rest; '%s' has %d. Said once.",
                    self.name, TOKENS, text, len(ids),
                )  # fmt: skip
                return


def load(source: str | Path, vision_layers: int = 24, cache_dir: str | Path | None = None) -> nn.ModuleDict:
    """Return the parts "vision", "text" and "head" with the weights of a folder or a hub id, in float32.

    Every key of the checkpoint is used or dropped by name, every parameter is found. Raises RewardError otherwise.
    """
    config_file = find_file(source, ["med_config.json"], cache_dir=cache_dir)
    file = find_file(source, ["ImageReward.pt"], cache_dir=cache_dir)
    options, weights = _text_options(config_file), read_tensors(file)
    try:
        model = build(options, weights["blip.visual_encoder.pos_embed"].shape,
                      weights["blip.visual_encoder.patch_embed.proj.weight"].shape, vision_layers)  # fmt: skip
    except KeyError as error:
        raise RewardError(
            f"{file} has no key {error}: it is no checkpoint of ImageReward, or a part of one."
        ) from error
    _load_all(model, weights, file)
    return model


def build(
    text_options: Mapping[str, Any], positions: Sequence[int], patches: Sequence[int], vision_layers: int
) -> nn.ModuleDict:
    """Return the parts with random weights; `positions` (1, N + 1, D) and `patches` (D, 3, p, p) set vision's sizes."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    width, patch = patches[0], patches[-1]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=width // WIDTH_OF_A_HEAD,
        image_size=patch * math.isqrt(positions[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    # is_decoder makes the layers that look at the picture; without it in the call, attention is not causal
    text = BlipTextConfig(**text_options, encoder_hidden_size=width, is_decoder=True, bos_token_id=None)
    widths = [text.hidden_size, *HEAD.values()]
    head = nn.Sequential()
    for place, inputs, outputs in zip(HEAD, widths, widths[1:], strict=False):
        head.add_module(place, nn.Linear(inputs, outputs))
    parts = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False), "head": head}
    return nn.ModuleDict(parts)


def published_key(key: str) -> str:
    """Return the key of the published checkpoint for one of ours."""
    for ours, theirs in PUBLISHED:
        key = key.replace(ours, theirs)
    return key


def load_tokenizer(source: str | Path, vocabulary: int, cache_dir: str | Path | None = None) -> Any:
    """Return BERT's tokenizer with BLIP's two tokens. Raises RewardError unless it then knows `vocabulary` tokens."""
    from transformers import BertTokenizer

    folder = find_file(source, ["vocab.txt", "tokenizer.json"], "tokenizer", cache_dir).parent
    with explained(source):
        tokenizer: Any = BertTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise RewardError(
            f"The tokenizer of '{source}' knows {len(tokenizer)} tokens and the model {vocabulary}: put the "
            "vocab.txt of bert-base-uncased into a folder and pass tokenizer=FOLDER."
        )
    return tokenizer


def _text_options(file: Path) -> dict[str, Any]:
    with explained(file):
        config = json.loads(file.read_text(encoding="utf-8"))
    missing = [key for key in TEXT_OPTIONS if not isinstance(config, dict) or key not in config]
    if missing:
        raise RewardError(f"{file} has no '{missing[0]}': put the published med_config.json there.")
    return {key: config[key] for key in TEXT_OPTIONS}


def _load_all(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Copy the weights. Raises RewardError for a key that is missing, of another shape, or not known."""
    own = {published_key(key): key for key in model.state_dict()}
    for key in own:
        if key not in weights:
            raise RewardError(f"{file} has no key '{key}': it is a part of a checkpoint. Use the published file.")
    unknown = sorted(set(weights) - set(own) - UNUSED)
    if unknown:
        raise RewardError(
            f"{file} has {len(unknown)} keys that ImageReward has not, '{unknown[0]}' among them: it is another "
            "model's, or vision_layers= is too small. Use the published file."
        )
    for key, parameter in zip(own, model.state_dict().values(), strict=True):
        if weights[key].shape != parameter.shape:
            got, wanted = tuple(weights[key].shape), tuple(parameter.shape)
            raise RewardError(f"In {file}, '{key}' has the shape {got}, not {wanted}. Use the published file.")
        parameter.copy_(weights[key])
