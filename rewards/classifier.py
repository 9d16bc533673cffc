"""Image classifiers: how surely a picture shows a class, by name, by index, or by the prompt.

Model: any image classifier of timm or transformers, from a folder or the hub; or a CLIP of open_clip that chooses
among texts. Source: Wightman, github.com/huggingface/pytorch-image-models; Wolf et al. 2020, arXiv 1910.03771;
zero-shot as in Radford et al. 2021, arXiv 2103.00020. Preprocessing: the model's own (size, crop, interpolation, mean,
std), in float32, differentiable. Range: a log-probability, up to 0, or a logit. Licence: the model's own; timm and
transformers are Apache-2.0. Memory: 0.35 GB for a ViT-B, with gradients about 0.1 GB a picture.
Fooled by: patterns that only the network sees, at a few levels of 1/255; pictures of no class at all, of which one
must still be chosen; class names in writing (CLIP).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm.errors import RewardError, nearest
from steerfm.reward import Reward
from steerfm.rewards import _image_models
from steerfm.rewards.clip import CLIPScore

RANGES = {"log_probability": (-math.inf, 0.0), "logit": None}


class ImageClassifier(Reward):
    """Score the log-probability (or the logit) of a class.

    `model`: a folder, or a hub id such as "google/vit-base-patch16-224" or "timm/resnet50.a1_in1k". `label`: the
    name of the class, one of its synonyms ("tabby, tabby cat" has two), or its index; None takes each sample's
    prompt as its class. `output`: "log_probability" or "logit". Raises RewardError.
    """

    def __init__(
        self,
        model: str | Path,
        label: str | int | None = None,
        output: str = "log_probability",
        *,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        _check_output(output, self.name)
        self.output, self.needs_prompt = output, label is None
        self.native_range = RANGES[output]
        self.model = _image_models.load_classifier(model, cache_dir)
        self._index = None if label is None else self._class_of(label)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the output of the class; (B,). Raises RewardError for a prompt that names none."""
        fixed = self._index
        classes = [self._class_of(prompt) for prompt in prompts] if fixed is None else [fixed] * len(images)
        logits = self.model(images)
        if max(classes) >= logits.shape[1]:
            raise RewardError(f"'{self.name}' has the classes 0 to {logits.shape[1] - 1}, got label={max(classes)}.")
        return _chosen(logits, classes, self.output)

    def _class_of(self, label: str | int) -> int:
        """Return the index of a class. Raises RewardError where nothing, or more than one class, has the name."""
        if isinstance(label, int):
            if label < 0:
                raise RewardError(f"The classes of '{self.name}' are counted from 0, got label={label}.")
            return label
        wanted = label.strip().casefold()
        found = [i for i, names in enumerate(self.model.labels) if wanted in (name.casefold() for name in names)]
        if len(found) == 1:
            return found[0]
        if found:
            raise RewardError(f"'{self.name}' has {len(found)} classes '{label}': pass one of the indices {found}.")
        if not self.model.labels:
            raise RewardError(f"The checkpoint of '{self.name}' does not name its classes: pass an index, label=0.")
        names = [name for all_names in self.model.labels for name in all_names]
        raise RewardError(f"'{self.name}' has no class '{label}'{nearest(label, names) or '; pass its name or index.'}")


class ZeroShotClassifier(Reward):
    """Score the log-probability (or the logit) of one text among several, by CLIP: what a picture shows, not how well.

    `texts` are the classes; `text` is the wanted one, and None takes each sample's prompt, which must be one of
    them. `template` is wrapped around each, "a photo of a {}". `model` and `weights` as for CLIPScore. Raises
    RewardError.
    """

    def __init__(
        self,
        texts: Sequence[str],
        text: str | None = None,
        model: str = "ViT-B-32",
        weights: str | Path | None = None,
        output: str = "log_probability",
        *,
        template: str = "{}",
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        _check_output(output, self.name)
        self.texts, self.text, self.output, self.template = list(texts), text, output, template
        self.needs_prompt, self.native_range = text is None, RANGES[output]
        if isinstance(texts, str) or len(set(self.texts)) < max(len(self.texts), 2):
            raise RewardError(f"'{self.name}' chooses among at least two different texts, got {texts!r}.")
        if template.count("{}") != 1:
            raise RewardError(f"The template of '{self.name}' has one {{}} for the text, got '{template}'.")
        if text is not None:
            self._class_of(text)
        self._clip = CLIPScore(model, weights, scaled=True, cache_dir=cache_dir, name=self.name)

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the output of the wanted text; (B,). Raises RewardError for a prompt that is none of the texts."""
        wanted = list(prompts) if self.text is None else [self.text] * len(images)
        return _chosen(self.logits(images), [self._class_of(text) for text in wanted], self.output)

    def logits(self, images: Tensor) -> Tensor:
        """Return the scaled cosines of pictures with all texts; (B, K)."""
        said = [self.template.replace("{}", text) for text in self.texts]
        with torch.autocast(images.device.type, enabled=False):
            cosines = self._clip.embed_images(images) @ self._clip.embed_texts(said, images.device).T
            bias = getattr(self._clip.model, "logit_bias", None)
            return cosines * self._clip.model.logit_scale.exp() + (0.0 if bias is None else bias)

    def _class_of(self, text: str) -> int:
        if text not in self.texts:
            raise RewardError(
                f"'{self.name}' has no text '{text}'{nearest(text, self.texts) or '.'} It has: {', '.join(self.texts)}."
            )
        return self.texts.index(text)


def _check_output(output: str, name: str) -> None:
    if output not in RANGES:
        raise RewardError(f"'{name}' gives {' or '.join(RANGES)}, got output='{output}'{nearest(output, RANGES)}")


def _chosen(logits: Tensor, classes: Sequence[int], output: str) -> Tensor:
    """Return one class of each row of logits (B, K); (B,)."""
    values = logits.log_softmax(1) if output == "log_probability" else logits
    return values.gather(1, torch.tensor(classes, device=logits.device)[:, None])[:, 0]
