"""Image models for rewards, of timm or of transformers: a folder or a hub id says itself which of them it is.

Both libraries write a config.json; timm's names an "architecture". Every key of a checkpoint is used, no code that
comes with a model is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.errors import RewardError
from steerfm.rewards import _transformers
from steerfm.rewards._open_clip import crop_or_pad

CONFIG_FILE = "config.json"
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
IMAGENET = re.compile(r"in\d+k")  # how timm's tags say what a model was trained on, "a1_in1k"


class ImageModel(nn.Module):
    """Turn pictures (B, 1 or 3, H, W) in [0, 1] into logits (B, K) or features (B, D): preprocessing and network.

    `labels` are the names of each class, empty where the checkpoint does not name them.
    """

    def __init__(
        self,
        network: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        take: Callable[[Any], Tensor],
        labels: Sequence[tuple[str, ...]] = (),
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.prepare, self.take, self.labels = prepare, take, labels

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits or features, in float32 whatever autocast says."""
        with torch.autocast(images.device.type, enabled=False):
            return self.take(self.network(self.prepare(images)))

    def train(self, mode: bool = True) -> ImageModel:
        """Stay in evaluation mode, whoever calls."""
        return super().train(False)


@dataclass(frozen=True)
class TimmPreprocessing:
    """Prepare pictures as timm's transform for evaluation does: resize, cut out the middle, normalise."""

    resizing: _transformers.Preprocessing
    crop: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Return pictures (B, 1 or 3, H, W) in [0, 1] as the model wants them; (B, 3, h, w)."""
        return crop_or_pad(self.resizing(images), self.crop, 0.0)


def load_classifier(source: str | Path, cache_dir: str | Path | None = None) -> ImageModel:
    """Return an image classifier from a folder or a hub id. Raises RewardError, naming a file or a key."""
    config = read_config(source, cache_dir)
    if "architecture" in config:
        network = _load_timm(source, config, cache_dir)
        if not network.num_classes:
            raise RewardError(f"'{source}' has no classes, only features: pass a model that was trained to classify.")
        return ImageModel(network, _timm_preprocessing(network, source), _itself, _timm_labels(network, config))
    network = _transformers.load_model("AutoModelForImageClassification", source, cache_dir=cache_dir)
    prepare = _transformers.load_preprocessing(source, cache_dir=cache_dir)
    names = network.config.id2label
    return ImageModel(network, prepare, _logits, [_synonyms(str(names[index])) for index in range(len(names))])


def load_features(source: str | Path, cache_dir: str | Path | None = None) -> ImageModel:
    """Return a network that gives features (B, D), such as DINO, from a folder or a hub id. Raises RewardError.

    timm's: what its classifier would read. transformers': the first token, which is the class's, or the mean over
    places of a map (B, D, h, w).
    """
    config = read_config(source, cache_dir)
    if "architecture" in config:
        network = _load_timm(source, config, cache_dir)
        network.reset_classifier(0)
        return ImageModel(network, _timm_preprocessing(network, source), _itself)
    network = _transformers.load_model("AutoModel", source, unused=("classifier.",), cache_dir=cache_dir)
    return ImageModel(network, _transformers.load_preprocessing(source, cache_dir=cache_dir), _features)


def read_config(source: str | Path, cache_dir: str | Path | None = None) -> Mapping[str, Any]:
    """Return the config.json of a folder or a hub id. Raises RewardError where it is missing or no JSON."""
    file = _transformers.find_file(source, [CONFIG_FILE], cache_dir=cache_dir)
    with _transformers.explained(file):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, Mapping):
        raise RewardError(f"{file} holds {type(config).__name__}, not the table of a model: use the published file.")
    return config


def _itself(output: Tensor) -> Tensor:
    return output


def _logits(output: Any) -> Tensor:
    return output.logits


def _features(output: Any) -> Tensor:
    hidden = output.last_hidden_state
    return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]


def _load_timm(source: str | Path, config: Mapping[str, Any], cache_dir: str | Path | None) -> Any:
    """Return a model of timm with its own weights, every key used."""
    import timm

    architecture = config["architecture"]
    if architecture not in timm.list_models():
        raise RewardError(f"'{source}' is of timm's architecture '{architecture}', which the installed timm lacks.")
    weights = _transformers.find_file(source, TIMM_WEIGHTS, cache_dir=cache_dir)
    folder = _transformers.find_file(source, [CONFIG_FILE], cache_dir=cache_dir).parent
    with _transformers.explained(source):
        network = timm.create_model(f"local-dir:{folder}", pretrained=False)
    tensors = _transformers.read_tensors(weights)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RewardError(f"The weights in {weights} do not fit '{architecture}' ({reason}): use its own.") from error
    return network


def _timm_preprocessing(network: Any, source: str | Path) -> TimmPreprocessing:
    """Return the preprocessing that a model of timm declares. Raises RewardError for one of another kind."""
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(network)
    channels, height, width = config["input_size"]
    mode, method = config["crop_mode"], config["interpolation"]
    cuts = mode == "squash" or (mode == "center" and height == width)
    if channels != 3 or method not in ("bilinear", "bicubic") or not cuts:
        raise RewardError(
            f"The preprocessing of '{source}' is none that steerfm knows: 3 channels, resized bilinear or bicubic, "
            f"squashed or cut to a square; got {channels} channels, {method}, {mode} to {height}x{width}."
        )
    scaled = (int(height / config["crop_pct"]), int(width / config["crop_pct"]))
    size = scaled if mode == "squash" else scaled[0]
    resizing = _transformers.Preprocessing(size, None, method, tuple(config["mean"]), tuple(config["std"]))
    return TimmPreprocessing(resizing, (height, width))


def _timm_labels(network: Any, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the names of the classes: the checkpoint's own, ImageNet's where its tag says so, else none."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    names, described = config.get("label_names"), config.get("label_descriptions") or {}
    if names is None:
        subset = infer_imagenet_subset(network)
        if subset is None or not IMAGENET.search(str(network.pretrained_cfg.get("tag"))):
            return []
        known = ImageNetInfo(subset)
        names = known.label_names()
        described = {name: known.label_name_to_description(name) for name in names}
    if isinstance(names, Mapping):
        names = [names.get(str(index), "") for index in range(network.num_classes)]
    return [(name, *_synonyms(str(described.get(name, "")))) for name in names]


def _synonyms(label: str) -> tuple[str, ...]:
    """Return "tabby, tabby cat" whole and in its parts."""
    parts = [part.strip() for part in label.split(",")]
    return tuple(dict.fromkeys(name for name in (label, *parts) if name))
