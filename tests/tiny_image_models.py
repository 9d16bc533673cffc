"""Small random image models, saved as timm and transformers publish theirs, and pictures like photographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from steerfm.rewards.similarity import BACKBONES

# Pillow rounds to whole levels of 1/255 after rows and after columns: at most half a level each, and the weights of
# the second pass sum to one, their absolute values to 1.3 where some are negative (bicubic).
LEVEL = 1 / 255
ROUNDING = (0.5 + 1.3 * 0.5) * LEVEL
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LABELS = ["tench, Tinca tinca", "crane", "tabby, tabby cat", "crane", "sports car, sport car"]


def natural(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return pictures with the 1/f spectrum of photographs, in whole levels of 1/255, (count, 3, height, width)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    spectrum = rng.standard_normal((count, 3, *frequency.shape, 2)) @ np.array([1, 1j]) / frequency
    pictures = np.fft.irfft2(spectrum, s=(height, width))
    pictures = 0.5 + 0.22 * pictures / pictures.std((2, 3), keepdims=True)
    return torch.from_numpy((pictures.clip(0, 1) * 255).round() / 255).float()


def pil(images: Tensor) -> list[Image.Image]:
    """Return pictures (B, 3, H, W) in [0, 1] as Pillow's."""
    return [Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for x in images]


def assert_same_pipeline(ours: Any, images: Tensor, pixels: Tensor, network: Callable[[Tensor], Tensor]) -> None:
    """Compare an ImageModel with a library's own pixels (B, 3, h, w) of the same pictures, and with its network.

    The network is compared on our pixels: a random one makes much of what rounding leaves between the two.
    """
    prepared = ours.prepare(images)
    assert prepared.shape == pixels.shape
    gap = (prepared - pixels).abs() * torch.tensor(STD).view(3, 1, 1)
    assert gap.max() <= ROUNDING + 1e-5
    assert gap.mean() <= LEVEL / 2
    with torch.no_grad():
        outputs = network(prepared)
        assert torch.allclose(ours(images), outputs, atol=1e-5)
    assert outputs.std(0).min() > 0.02  # the test would see pictures mixed up


def save_timm(folder: Path, classes: int = 5, config: dict[str, Any] | None = None, **preprocessing: Any) -> Path:
    """Save timm's smallest vision transformer with random weights, as timm publishes models."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=classes)
    enliven(model)
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = {"input_size": [3, 32, 32], "crop_pct": 0.9, "mean": MEAN, "std": STD, **preprocessing}
    save_for_hf(model, str(folder), {**(config or {}), "pretrained_cfg": preprocessing}, safe_serialization=True)
    return folder


def save_transformers(folder: Path, kind: str = "Dinov2ForImageClassification") -> Path:
    """Save a small DINOv2 with random weights and its image processor, as transformers publishes them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    enliven(model)
    model.save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=3,
        image_mean=MEAN, image_std=STD,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def enliven(model: nn.Module) -> None:
    """Widen random weights, so that outputs tell pictures apart."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1.0 / parameter[0].numel() ** 0.5)


def save_backbone(path: Path, name: str = "alex") -> Path:
    """Save random features as torchvision publishes a network, with a classifier that is not to be read."""
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):
        layers = getattr(torchvision.models, BACKBONES[name][0])(weights=None).features
    layers = layers.to_empty(device="cpu")
    tensors = {}
    for key, value in layers.state_dict().items():
        spread = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
        tensors[f"features.{key}"] = torch.randn_like(value) * spread
    torch.save({**tensors, "classifier.1.weight": torch.randn(2, 2)}, path)
    return path
