"""PickScore: which picture people would pick for a prompt, by a CLIP tuned on half a million of their choices.

Model: ViT-H/14 CLIP, yuvalkirstain/PickScore_v1 on the hub, read with the tokenizer and the preprocessing of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K, as its card says. Source: Kirstain et al. 2023, arXiv 2305.01569;
github.com/yuvalkirstain/PickScore. Preprocessing: shorter side 224, bicubic, centre crop, CLIP's mean and std.
Range: exp(logit scale) times a cosine, about 18 to 24 for pictures; differences of 1 are large: exp of a difference
is the odds of being picked. Licence: MIT. Memory: 3.9 GB in float32, with gradients about 0.4 GB a picture.
Fooled by: gloss and saturation whatever the prompt, grid artefacts and textures that only the network sees. It sees
nothing outside the centre crop, and no prompt beyond 77 tokens, of which it warns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import RewardError
from steerfm.reward import Reward
from steerfm.rewards._texts import TextEmbeddings
from steerfm.rewards._transformers import load_model, load_preprocessing, load_tokenizer

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HIGHEST = 2  # the eos_token_id of old configs, for which transformers reads the highest token instead


class PickScore(Reward):
    """Score how likely people are to pick a picture for its prompt: exp(logit scale) times CLIP's cosine.

    `model`: a hub id, or a folder with config.json and the weights. `processor`: where the tokenizer and the
    preprocessing are; left out, the folder itself, or for a hub id what the model's card names. `prompt` fixes one
    text for every sample. Raises RewardError where something is missing or does not fit, naming the file.
    """

    def __init__(
        self,
        model: str | Path = MODEL,
        processor: str | Path | None = None,
        prompt: str | None = None,
        *,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.prompt, self.needs_prompt = prompt, prompt is None
        if processor is None:
            processor = model if Path(model).expanduser().exists() else PROCESSOR
        self.model = load_model("CLIPModel", model, cache_dir=cache_dir)
        text = self.model.config.text_config
        option = {"option": "processor", "cache_dir": cache_dir}
        self._tokenizer = load_tokenizer(processor, text.vocab_size, **option)
        self._preprocess = load_preprocessing(processor, **option)
        _check_end(self._tokenizer, text, processor)
        self._limit = int(text.max_position_embeddings)
        self._embed_texts = TextEmbeddings(self.name, self._limit, self._tokens_of, self._encode)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the scaled cosine of each picture with its prompt; (B,)."""
        texts = list(prompts) if self.prompt is None else [self.prompt] * len(images)
        with torch.autocast(images.device.type, enabled=False):
            pictures = self.model.get_image_features(pixel_values=self._preprocess(images)).pooler_output
            cosine = (functional.normalize(pictures, dim=-1) * self._embed_texts(texts, images.device)).sum(1)
            return cosine * self.model.logit_scale.exp()

    def _tokens_of(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        read = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._limit, return_tensors="pt"
        ).to(device)
        embedded = self.model.get_text_features(read["input_ids"], attention_mask=read["attention_mask"])
        return functional.normalize(embedded.pooler_output, dim=-1)


def _check_end(tokenizer: Any, text: Any, processor: str | Path) -> None:
    """Refuse a tokenizer whose last token is not the one at which the model reads a text."""
    end = tokenizer.eos_token_id
    reads = text.vocab_size - 1 if text.eos_token_id == HIGHEST else text.eos_token_id
    if end != reads:
        raise RewardError(
            f"The tokenizer of '{processor}' ends texts with token {end}, and the model reads them at {reads}: pass "
            f"processor= the tokenizer that it was trained with, {PROCESSOR} for PickScore v1."
        )
