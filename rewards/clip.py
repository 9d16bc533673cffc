"""CLIP score: the cosine between a picture and a text, by any CLIP that open_clip can load.

Model: open_clip's by name and weights, for example ("ViT-B-32", "laion2b_s34b_b79k"), or a small one trained with
steerfm.modules.ClipTraining. Source: Radford et al. 2021, arXiv 2103.00020; Hessel et al. 2021, arXiv 2104.08718.
Preprocessing: the model's own (size, resize mode, interpolation, crop, mean, std), in float32, differentiable.
Range: a cosine in [-1, 1]; public models give about 0.2 to 0.35. Licence: MIT (code), the weights' own.
Memory: 0.6 GB for ViT-B-32, with gradients about 20 MB a picture. Fooled by: written words, textures that only
the network sees, and prompts longer than its context (77 tokens, of which it warns).
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
from steerfm.rewards import _open_clip
from steerfm.rewards._texts import TextEmbeddings


class CLIPScore(Reward):
    """Score how well a picture fits its prompt: the cosine of their CLIP embeddings.

    `model` and `weights` as for open_clip: a name with a hub tag, a file or a folder; "hf-hub:org/repository";
    or a folder in the published format alone. `prompt` fixes one text for every sample, whatever the flow map
    is asked for. `scaled` multiplies by the model's learnt logit scale (and adds its bias, for SigLIP models).
    Raises RewardError where the model cannot be loaded whole, naming the file that is missing.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        weights: str | Path | None = None,
        prompt: str | None = None,
        *,
        scaled: bool = False,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if prompt is not None and not isinstance(prompt, str):
            raise RewardError(f"'{self.name}' fixes one prompt for all pictures, got {type(prompt).__name__}.")
        self.prompt, self.needs_prompt = prompt, prompt is None
        self.scaled = scaled
        self._clip = _open_clip.load(str(model), weights, cache_dir)
        self.model = self._clip.model
        limit = int(self._clip.tokenizer.context_length)
        self._embed_texts = TextEmbeddings(self.name, limit, self._clip.tokens_of, self._encode)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the cosine (or scaled logit) of each picture with its prompt; (B,)."""
        texts = list(prompts) if self.prompt is None else [self.prompt] * len(images)
        with torch.autocast(images.device.type, enabled=False):
            cosine = (self.embed_images(images) * self.embed_texts(texts, images.device)).sum(1)
            if not self.scaled:
                return cosine
            bias = getattr(self.model, "logit_bias", None)
            return cosine * self.model.logit_scale.exp() + (0.0 if bias is None else bias)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return the embeddings of pictures (B, 1 or 3, H, W) in [0, 1], of length one; (B, D)."""
        pictures = _open_clip.preprocess(images, self._clip.preprocessing)
        return functional.normalize(self.model.encode_image(pictures), dim=-1)

    def embed_texts(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Return the embeddings of texts, of length one, without gradient; (B, D). They are kept by text."""
        return self._embed_texts(texts, torch.device(device))

    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        return functional.normalize(self.model.encode_text(self._clip.tokenizer(texts).to(device)), dim=-1)
