"""Human preference score v2 and v2.1: how well people would like a picture for a prompt.

Model: ViT-H/14 CLIP of open_clip, tuned on 798 thousand human choices (v2); HPS_v2_compressed.pt and
HPS_v2.1_compressed.pt of xswu/HPSv2 on the hub. Source: Wu et al. 2023, arXiv 2306.09341; github.com/tgxs002/HPSv2.
Preprocessing: the longer side 224, bicubic, then black to the square (no crop), CLIP's mean and std. Range: a
cosine, about 0.2 to 0.35. Licence: Apache-2.0. Memory: 3.9 GB in float32, with gradients about 0.4 GB a picture.
Fooled by: gloss and saturation whatever the prompt, grid artefacts and textures that only the network sees. Prompts
beyond 77 tokens are cut, of which it warns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import RewardError
from steerfm.reward import Reward
from steerfm.rewards import _open_clip
from steerfm.rewards._texts import TextEmbeddings
from steerfm.rewards._transformers import find_weights, read_tensors

HUB = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
PADDING = {"resize_mode": "longest", "fill_color": 0}  # in place of the crop of plain CLIP


class HPSv2(Reward):
    """Score human preference by HPS v2.1 or v2: the cosine of a tuned CLIP's embeddings.

    `weights`: the published file, a folder that holds it, or a hub id. `version`: "v2.1" or "v2.0", which file of
    the folder or hub, and the reward's name in logs. `prompt` fixes one text for every sample. `architecture`:
    open_clip's name. Raises RewardError where a file is missing, partial or of another model.
    """

    def __init__(
        self,
        weights: str | Path = HUB,
        version: str = "v2.1",
        prompt: str | None = None,
        *,
        architecture: str = "ViT-H-14",
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or f"hps_{version}")
        if version not in FILES:
            raise RewardError(f"'{self.name}' has the versions {' and '.join(FILES)}, got version={version!r}.")
        self.prompt, self.needs_prompt = prompt, prompt is None
        file = find_weights(weights, (FILES[version],), cache_dir)
        _check_version(file, version)
        clip = _load(file, architecture)
        self.model = clip.model
        self._tokenizer = clip.tokenizer
        self._preprocessing = clip.preprocessing | PADDING
        limit = int(self._tokenizer.context_length)
        self._embed_texts = TextEmbeddings(self.name, limit, clip.tokens_of, self._encode)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the cosine of each picture with its prompt; (B,)."""
        texts = list(prompts) if self.prompt is None else [self.prompt] * len(images)
        with torch.autocast(images.device.type, enabled=False):
            pictures = self.model.encode_image(_open_clip.preprocess(images, self._preprocessing), normalize=True)
            return (pictures * self._embed_texts(texts, images.device)).sum(1)

    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        return functional.normalize(self.model.encode_text(self._tokenizer(texts).to(device)), dim=-1)


def _load(file: Path, architecture: str) -> _open_clip.OpenClip:
    """Return the tuned CLIP with its tokenizer; every key of the file is used, and none is missing."""
    _check_tuned(file)
    with torch.random.fork_rng(devices=[]):
        return _open_clip.load(architecture, file)


def _check_tuned(file: Path) -> None:
    found = read_tensors(file)
    if not isinstance(found.get("state_dict"), Mapping):
        raise RewardError(
            f"{file} has no 'state_dict', which the published checkpoints of HPS have: a plain CLIP of that size would "
            f"score without complaint. Use {' or '.join(FILES.values())} of {HUB}."
        )


def _check_version(file: Path, version: str) -> None:
    other = next((key for key, published in FILES.items() if published == file.name), version)
    if other != version:
        raise RewardError(f"{file.name} is HPS {other}, got version='{version}': pass version='{other}'.")
