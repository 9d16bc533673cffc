"""Aesthetic scores: how well people would rate a picture, by a linear map of a picture encoder's embedding.

Model: CLIP ViT-L/14 of OpenAI with LAION's linear heads: v2, `sac+logos+ava1-l14-linearMSE.pth` (five linear layers
without activations, so one linear map), github.com/christophschuhmann/improved-aesthetic-predictor; v1,
`sa_0_4_vit_l_14_linear.pth`, github.com/LAION-AI/aesthetic-predictor. v2.5: SigLIP so400m-patch14-384 with
`aesthetic_predictor_v2_5.pth`, github.com/discus0434/aesthetic-predictor-v2-5. Source: Schuhmann et al. 2022,
arXiv 2210.08402 (v1 and v2). Preprocessing: the encoder's (224, bicubic, centre crop, CLIP's mean and std; v2.5: 384 x
384, bicubic, mean and std 1/2), then the embedding at length one. Range: ratings from 1 to 10 in training; v1 and v2
about 4 to 7, v2.5 above 5.5 is very good; nothing bounds them. Licence of the heads: Apache-2.0 (v2), MIT (v1),
**AGPL-3.0 (v2.5)**, which is loaded only where you give it; of the encoders: MIT (CLIP), Apache-2.0 (SigLIP).
Memory: 1.2 GB, v2.5 1.7 GB; with gradients about 0.35 GB and 0.9 GB a picture.
Fooled by: nearly everything. A linear map has no notion of a picture: optimised without a limit, v2 reads 23. It never
sees the prompt; hold it against PickScore or ImageReward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.errors import RewardError
from steerfm.reward import Reward
from steerfm.rewards._transformers import find_weights, load_model, load_preprocessing, read_tensors

CLIP = "openai/clip-vit-large-patch14"
HEAD = "trl-lib/ddpo-aesthetic-predictor"  # v2 on the hub, as TRL used it
HEAD_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth")
SIGLIP = "google/siglip-so400m-patch14-384"
HEAD_FILES_V25 = ("aesthetic_predictor_v2_5.pth",)

V1 = ("",)
V2 = ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")
V25 = ("scoring_head.0.", "scoring_head.2.", "scoring_head.4.", "scoring_head.6.", "scoring_head.8.")


class Aesthetic(Reward):
    """Score a picture's looks by LAION's aesthetic predictor, v2 or v1; prompts are not read.

    `weights`: the head's file (which of the two is seen from its keys), a folder that holds it, or a hub id.
    `model`: the CLIP ViT-L/14, a hub id or a folder. Raises RewardError where a file is missing or does not fit.
    """

    def __init__(
        self,
        weights: str | Path = HEAD,
        model: str | Path = CLIP,
        *,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        file = find_weights(weights, HEAD_FILES, cache_dir)
        self.head = LinearHead(*linear_map(read_tensors(file), (V2, V1), file))
        self.model = load_model(
            "CLIPVisionModelWithProjection",
            model,
            unused=("text_model.", "text_projection.", "logit_scale"),
            cache_dir=cache_dir,
        )
        _check_width(self.head.weight, self.model.config.projection_dim, file, model)
        self._preprocess = load_preprocessing(model, cache_dir=cache_dir)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the predicted rating; (B,)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.head(self.model(pixel_values=self._preprocess(images)).image_embeds)


class AestheticV25(Reward):
    """Score a picture's looks by aesthetic predictor v2.5; prompts are not read.

    `weights`: the head's file, a folder that holds it, or a hub id; there is no default, since it is AGPL-3.0.
    `model`: the SigLIP, a hub id or a folder. Raises RewardError where a file is missing or does not fit.
    """

    name = "aesthetic_v25"

    def __init__(
        self,
        weights: str | Path,
        model: str | Path = SIGLIP,
        *,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        file = find_weights(weights, HEAD_FILES_V25, cache_dir)
        self.head = LinearHead(*linear_map(read_tensors(file), (V25,), file))
        self.model = load_model(
            "SiglipVisionModel", model, unused=("text_model.", "logit_scale", "logit_bias"), cache_dir=cache_dir
        )
        _check_width(self.head.weight, self.model.config.hidden_size, file, model)
        self._preprocess = load_preprocessing(model, cache_dir=cache_dir)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the predicted rating; (B,)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.head(self.model(pixel_values=self._preprocess(images)).pooler_output)


class LinearHead(nn.Module):
    """Rate embeddings (B, D), brought to length one, by one linear map: weight (D,), bias ()."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, embedded: Tensor) -> Tensor:
        """Return the ratings; (B,)."""
        return functional.normalize(embedded, dim=-1) @ self.weight + self.bias


def linear_map(tensors: Mapping[str, Any], layouts: Sequence[Sequence[str]], file: str | Path) -> tuple[Tensor, Tensor]:
    """Return the one linear map that linear layers in a row make: weight (D,) and bias (), in float32.

    A layout lists the layers' names as prefixes of "weight" and "bias", in order. Raises RewardError unless the
    file holds the keys of one layout exactly, with shapes that fit each other and end in one value.
    """
    needed = [sorted(f"{layer}{part}" for layer in layers for part in ("weight", "bias")) for layers in layouts]
    if sorted(tensors) not in needed:
        raise RewardError(
            f"{file} is no head of this predictor: its keys are {', '.join(sorted(tensors)[:3])} ..., and exactly "
            f"{' or '.join(', '.join(keys) for keys in needed)} are needed."
        )
    layers = layouts[needed.index(sorted(tensors))]
    weight, bias = tensors[f"{layers[0]}weight"].double(), tensors[f"{layers[0]}bias"].double()
    try:
        for layer in layers[1:]:
            matrix, shift = tensors[f"{layer}weight"].double(), tensors[f"{layer}bias"].double()
            weight, bias = matrix @ weight, matrix @ bias + shift
        return weight.squeeze(0).float(), bias.squeeze(0).float()
    except RuntimeError as error:
        raise RewardError(f"The layers of {file} do not fit each other ({error}): use the published file.") from error


def _check_width(weight: Tensor, width: int, file: Path, model: str | Path) -> None:
    if tuple(weight.shape) != (width,):
        raise RewardError(
            f"{file} makes ratings by a map of the shape {tuple(weight.shape)}, and '{model}' embeddings of {width} "
            "numbers: pass the encoder that the head was trained on."
        )
